"""ExFlow: an integer program that keeps the flow between layers on its rank.

Problem: the experts of all layers to ranks, equally many of a layer on each, so that as few tokens
as possible change rank between consecutive layers.

The paper's program has x_ig = 1 if expert i is on rank g and, for every token and layer, a cost of
1 if the token's two experts have different ranks. Here tokens are added up to the affinity first,
which changes nothing, and the names of the ranks are eliminated: s_uv = 1 if experts u and v, of
the same or of neighbouring layers, share a rank. The paper's form has G! copies of every placement
and a linear relaxation that proves nothing; this one has neither fault.

    maximise   sum over layers l, experts u of l and v of l+1 of affinity_l[u, v] s_uv
    (1)  s_uv + s_vw - s_uw <= 1    u, v, w of one layer or of two neighbouring ones: sharing a rank
                                    is transitive, so that every expert is on one rank
    (2)  sum_v s_uv = E/G - 1       u and v of one layer: equally many experts on each rank
    (3)  sum_v s_uv = E/G           u and v of neighbouring layers: each rank goes on
    s_uv binary

With several nodes, two stages as in the paper: experts to nodes, then those of a node to its ranks.

Method: `solvers.chain` finds a placement (seconds, near the optimum); the integer program improves
it or proves it optimal where E <= 16 and G divides E; CP-SAT runs on one thread for a fixed
amount of work. Beyond that size the placement of `solvers.chain` is the answer. Where G does not
divide E, the first E mod G ranks get one expert more in every layer.

Complexity: the program has O(L E^2) variables and O(L E^3) constraints; NP-hard.
Guarantee: without redundant slots and on one node, lower_bound is proven for cross_rank_fraction:
from the integer program where it ran, else from `solvers.bounds`.

Source: Yao et al., Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model
Inference, arXiv 2401.08383, section IV; its published code solves the program with Gurobi under a
time limit, for numbers of ranks that are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from solvers.binary_program import Backend, BinaryProgram, solve
from solvers.bounds import kept_flow_bound, to_integers
from solvers.budget import Budget
from solvers.chain import Ranks, effort_for, keep_flow, kept_flow
from solvers.contiguous import contiguous, fill
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution, Termination

MAX_EXPERTS = 16
MAX_IMPLICATIONS: dict[Backend, int] = {"cp_sat": 200_000, "cbc": 11_000}
EFFORT = 10.0
_SOURCE = "ExFlow (arXiv 2401.08383)"


@register("exflow", source=_SOURCE, needs=("affinity",))
def exflow(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Keep inter-layer affinity on a rank, equally many experts on each; OR-tools' CP-SAT.

    Sees neither load nor co-activation.
    """
    return _solve(problem, seed, budget, "cp_sat")


@register("exflow_pulp", source=_SOURCE, needs=("affinity",), deterministic=False)
def exflow_pulp(problem: Problem, seed: int, budget: Budget) -> Solution:
    """The program of `exflow`, solved by CBC through PuLP: slower, a second opinion.

    Sees neither load nor co-activation. CBC stops after 30 seconds, so that a large program may end
    differently on another machine.
    """
    return _solve(problem, seed, budget, "cbc")


def _solve(problem: Problem, seed: int, budget: Budget, backend: Backend) -> Solution:
    assert problem.affinity is not None
    rng = np.random.default_rng(seed)
    flow = np.ascontiguousarray(problem.affinity, dtype=np.float64)
    sizes = np.array(
        [part.size for part in np.array_split(np.arange(problem.num_experts), problem.num_ranks)]
    )
    total = float(flow.sum())
    if total <= 0:
        return contiguous(problem, seed, budget)
    if problem.num_nodes == 1:
        stages = [place(flow, sizes, rng, budget, backend)]
        ranks, upper_bound = stages[0].ranks, stages[0].upper_bound
    else:
        ranks, stages = _place_by_node(problem, flow, sizes, rng, budget, backend)
        upper_bound = None
    placement = fill(problem, np.argsort(ranks, axis=1, kind="stable"))
    termination: Termination = "finished"
    if any(stage.cut_short for stage in stages):
        termination = "interrupted" if budget.interrupted else "time_limit"
    bound = 1.0 - min(total, kept_flow_bound(flow, problem)) / total
    if upper_bound is not None and problem.num_slots == problem.num_experts:
        bound = max(bound, 1.0 - upper_bound / total)
    return Solution(
        placement,
        lower_bound=bound,
        bound_of="cross_rank_fraction",
        termination=termination,
        notes={"integer_program": ", ".join(dict.fromkeys(stage.program for stage in stages))},
    )


@dataclass(frozen=True, eq=False)
class Stage:
    """What one stage found.

    Attributes:
        ranks: [L, E] group of each expert.
        upper_bound: what the integer program proved no placement with the same sizes to exceed in
            flow within groups; None if it did not run or told nothing.
        program: "not run", "optimal" or "not proved".
        cut_short: whether the budget ended the stage.
    """

    ranks: Ranks
    upper_bound: float | None
    program: str
    cut_short: bool


def place(
    flow: NDArray[np.float64],
    sizes: NDArray[np.int64],
    rng: np.random.Generator,
    budget: Budget,
    backend: Backend,
) -> Stage:
    """One stage: experts to groups of the given sizes.

    Args:
        flow: [L-1, E, E] between experts of neighbouring layers.
        sizes: [G] experts of each group.
    """
    num_layers, num_experts = len(flow) + 1, flow.shape[1]
    effort = effort_for(num_layers, num_experts, sizes.size)
    ranks = keep_flow(flow, sizes, rng, budget, effort)
    if budget.expired() or not _is_small(num_layers, num_experts, sizes, MAX_IMPLICATIONS[backend]):
        return Stage(ranks, None, "not run", budget.expired())
    weights, scale = to_integers(flow)
    program, pairs = _program(weights, int(sizes[0]))
    answer = solve(program, backend, _shared(ranks, pairs), EFFORT, budget)
    if answer.values is not None:
        found = _ranks(answer.values, pairs, num_layers, num_experts)
        if kept_flow(flow, found) > kept_flow(flow, ranks):
            ranks = found
    return Stage(
        ranks,
        None if answer.upper_bound is None else answer.upper_bound / scale,
        "optimal" if answer.optimal else "not proved",
        budget.expired(),
    )


def _place_by_node(
    problem: Problem,
    flow: NDArray[np.float64],
    sizes: NDArray[np.int64],
    rng: np.random.Generator,
    budget: Budget,
    backend: Backend,
) -> tuple[Ranks, list[Stage]]:
    """Experts to nodes, then the experts of each node to its ranks.

    Half of the time goes to the first stage; the rest is shared by the nodes.

    Returns:
        [L, E] rank of each expert, and the stages.
    """
    sizes_by_node = sizes.reshape(problem.num_nodes, problem.ranks_per_node)
    stages = [place(flow, sizes_by_node.sum(axis=1), rng, budget.part(0.5), backend)]
    nodes = stages[0].ranks
    ranks = np.empty_like(nodes)
    for node, node_sizes in enumerate(sizes_by_node):
        if node_sizes.sum() == 0:
            continue
        members = np.stack([np.nonzero(row == node)[0] for row in nodes])
        inside = np.stack(
            [
                layer_flow[np.ix_(members[layer], members[layer + 1])]
                for layer, layer_flow in enumerate(flow)
            ]
        )
        share = budget.part(1 / (problem.num_nodes - node))
        stages.append(place(inside, node_sizes, rng, share, backend))
        found = stages[-1].ranks + node * problem.ranks_per_node
        np.put_along_axis(ranks, members, found, axis=1)
    return ranks, stages


def _is_small(
    num_layers: int, num_experts: int, sizes: NDArray[np.int64], max_implications: int
) -> bool:
    """Whether the integer program is within reach."""
    within = num_experts * (num_experts - 1) * (num_experts - 2) // 2
    between = 3 * num_experts**2 * (num_experts - 1)
    return (
        bool((sizes == sizes[0]).all())
        and sizes.size > 1
        and num_experts <= MAX_EXPERTS
        and num_layers * within + (num_layers - 1) * between <= max_implications
    )


Pairs = dict[tuple[int, int], int]


def _program(weights: NDArray[np.int64], rank_size: int) -> tuple[BinaryProgram, Pairs]:
    """The integer program, and the number of s_uv by (u, v), u < v; expert e of layer l is l E + e.

    Args:
        weights: [L-1, E, E] flow.
        rank_size: E/G.
    """
    num_layers, num_experts = len(weights) + 1, weights.shape[1]
    layers = [range(layer * num_experts, (layer + 1) * num_experts) for layer in range(num_layers)]
    program = BinaryProgram()
    keys = [pair for layer in layers for pair in combinations(layer, 2)]
    keys += [(u, v) for here, there in pairwise(layers) for u in here for v in there]
    s: Pairs = dict(zip(keys, program.binaries(len(keys)), strict=True))

    def shared(u: int, v: int) -> int:
        return s[min(u, v), max(u, v)]

    def transitive(u: int, v: int, w: int) -> None:
        for a, b, c in ((u, v, w), (v, w, u), (w, u, v)):
            program.implies([shared(a, b), shared(b, c)], shared(a, c))

    for layer in layers:
        # (1) within a layer
        for u, v, w in combinations(layer, 3):
            transitive(u, v, w)
        # (2)
        for u in layer:
            program.total([shared(u, v) for v in layer if v != u], rank_size - 1)
    for here, there in pairwise(layers):
        # (1) across two layers
        for one, other in ((here, there), (there, here)):
            for u, v in combinations(one, 2):
                for w in other:
                    transitive(u, v, w)
        # (3)
        for u in here:
            program.total([shared(u, v) for v in there], rank_size)
        for v in there:
            program.total([shared(u, v) for u in here], rank_size)
    program.maximise(
        {
            shared(here[i], there[j]): int(weights[layer, i, j])
            for layer, (here, there) in enumerate(pairwise(layers))
            for i, j in np.argwhere(weights[layer] > 0)
        }
    )
    return program, s


def _shared(ranks: Ranks, pairs: Pairs) -> NDArray[np.bool_]:
    """The point of the program that is a placement."""
    flat = ranks.ravel()
    u, v = np.array(list(pairs)).T
    same: NDArray[np.bool_] = flat[u] == flat[v]
    return same


def _ranks(values: NDArray[np.bool_], pairs: Pairs, num_layers: int, num_experts: int) -> Ranks:
    """The placement that is a point of the program; ranks named by their first expert."""
    ranks = np.full(num_layers * num_experts, -1, np.int64)
    same = {pair for pair, variable in pairs.items() if values[variable]}
    num_ranks = 0
    for v in range(num_experts):
        known = [ranks[u] for u in range(v) if (u, v) in same]
        ranks[v] = known[0] if known else num_ranks
        num_ranks += not known
    for v in range(num_experts, ranks.size):
        before = v // num_experts * num_experts - num_experts
        ranks[v] = next(ranks[u] for u in range(before, before + num_experts) if (u, v) in same)
    return ranks.reshape(num_layers, num_experts)

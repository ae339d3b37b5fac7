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

Solvers: the paper is about top-1 models, and its program takes the one expert of a token in a
layer. `exflow_top1` is that: it looks at the primary experts alone. The others take all of a
token's experts, each pair of consecutive ones in equal shares (`Problem.affinity`).

- `exflow`, `exflow_top1`: with several nodes two stages, experts to nodes, then those of a node to
  its ranks, as in the paper.
- `exflow_one_stage`: to the ranks at once, whatever their nodes.
- `exflow_bisection`: into halves of the ranks again and again, what the published code does by
  default (`use_bipart`); here for any number of ranks.

Method: `solvers.chain` finds a placement (seconds, near the optimum); the integer program improves
it or proves it optimal where E <= 16 and G divides E, within a fixed amount of work. Beyond that
size the placement of `solvers.chain` is the answer. Where G does not divide E, the first E mod G
ranks get one expert more in every layer. The published code stops Gurobi after a minute for each
program, so its placements are no better than these.

Complexity: the program has O(L E^2) variables and O(L E^3) constraints; NP-hard.
Guarantee: lower_bound is proven for cross_rank_fraction (but for `exflow_top1`): from the integer
program where it placed the ranks at once and there are no redundant slots, else from
`solvers.bounds`.

Source: Yao et al., Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model
Inference, arXiv 2401.08383, section IV; its code, github.com/YJHMITWEB/ExFlow, solve_affinity.py,
solves the program with Gurobi under a time limit, for numbers of ranks that are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import kept_flow_bound, to_integers
from solvers.budget import Budget
from solvers.chain import Ranks, effort_for, keep_flow, kept_flow
from solvers.contiguous import contiguous, fill
from solvers.integer_program import BACKENDS, Backend, IntegerProgram, Point, solve
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution, Termination

MAX_EXPERTS = 16
MAX_IMPLICATIONS: dict[Backend, int] = {
    "cp_sat": 200_000,
    "highs": 11_000,
    "scip": 11_000,
    "cbc": 11_000,
}
EFFORT = 3.0
_SOURCE = "ExFlow (arXiv 2401.08383)"

Split = Callable[[Sequence[int]], list[Sequence[int]]]
"""Ranks into the parts that a stage tells apart."""


@register("exflow", source=_SOURCE, needs=("affinity",), backends=BACKENDS)
def exflow(problem: Problem, seed: int, budget: Budget, backend: Backend = "cp_sat") -> Solution:
    """Keep inter-layer affinity on a node, then on a rank, equally many experts on each.

    Sees neither load nor co-activation.
    """
    assert problem.affinity is not None
    return _solve(problem, problem.affinity, _by_node(problem), seed, budget, backend)


@register("exflow_pulp", source=_SOURCE, needs=("affinity",), deterministic=False)
def exflow_pulp(problem: Problem, seed: int, budget: Budget) -> Solution:
    """The same as `exflow:cbc`: CBC through PuLP."""
    return exflow(problem, seed, budget, "cbc")


@register("exflow_one_stage", source=_SOURCE, needs=("affinity",), backends=BACKENDS)
def exflow_one_stage(
    problem: Problem, seed: int, budget: Budget, backend: Backend = "cp_sat"
) -> Solution:
    """Keep inter-layer affinity on a rank, whatever its node."""
    assert problem.affinity is not None
    return _solve(problem, problem.affinity, _one_by_one, seed, budget, backend)


@register("exflow_bisection", source=_SOURCE, needs=("affinity",), backends=BACKENDS)
def exflow_bisection(
    problem: Problem, seed: int, budget: Budget, backend: Backend = "cp_sat"
) -> Solution:
    """Keep inter-layer affinity in halves of the ranks, then in halves of these, and so on."""
    assert problem.affinity is not None
    return _solve(problem, problem.affinity, _halves, seed, budget, backend)


@register("exflow_top1", source=_SOURCE, needs=("tokens",), backends=BACKENDS)
def exflow_top1(
    problem: Problem, seed: int, budget: Budget, backend: Backend = "cp_sat"
) -> Solution:
    """As the paper has it, for top-1 models: keep the way of the primary experts on a rank."""
    solution = _solve(problem, primary_flow(problem), _by_node(problem), seed, budget, backend)
    return Solution(solution.placement, termination=solution.termination, notes=solution.notes)


def primary_flow(problem: Problem) -> NDArray[np.float64]:
    """[L-1, E, E] tokens whose primary experts of two consecutive layers these are."""
    tokens = problem.tokens
    assert tokens is not None
    primary = tokens[:, :, 0] if problem.primary is None else problem.primary
    num_experts = problem.num_experts
    flow = np.zeros((problem.num_layers - 1, num_experts, num_experts))
    for layer in range(problem.num_layers - 1):
        here, there = primary[:, layer].astype(np.int64), primary[:, layer + 1]
        both = (here >= 0) & (there >= 0)
        key = (here * num_experts + there)[both]
        counts = np.bincount(key, minlength=num_experts**2)
        flow[layer] = counts.reshape(num_experts, num_experts)
    return flow


def _one_by_one(ranks: Sequence[int]) -> list[Sequence[int]]:
    return [[rank] for rank in ranks]


def _halves(ranks: Sequence[int]) -> list[Sequence[int]]:
    middle = -(-len(ranks) // 2)
    return [ranks[:middle], ranks[middle:]]


def _by_node(problem: Problem) -> Split:
    def split(ranks: Sequence[int]) -> list[Sequence[int]]:
        size = problem.ranks_per_node
        if len(ranks) <= size:
            return _one_by_one(ranks)
        return [ranks[first : first + size] for first in range(0, len(ranks), size)]

    return split


def _solve(
    problem: Problem,
    affinity: NDArray[np.float64],
    split: Split,
    seed: int,
    budget: Budget,
    backend: Backend,
) -> Solution:
    rng = np.random.default_rng(seed)
    flow = np.ascontiguousarray(affinity, dtype=np.float64)
    sizes = np.array(
        [part.size for part in np.array_split(np.arange(problem.num_experts), problem.num_ranks)]
    )
    total = float(flow.sum())
    if total <= 0:
        return contiguous(problem, seed, budget)
    ranks = np.zeros((problem.num_layers, problem.num_experts), np.int64)
    stages = _place_parts(
        ranks, np.arange(problem.num_ranks).tolist(), split, flow, sizes, rng, budget, backend
    )
    placement = fill(problem, np.argsort(ranks, axis=1, kind="stable"))
    termination: Termination = "finished"
    if any(stage.cut_short for stage in stages):
        termination = "interrupted" if budget.interrupted else "time_limit"
    bound = 1.0 - min(total, kept_flow_bound(flow, problem)) / total
    upper_bound = stages[0].upper_bound if len(stages) == 1 else None
    at_once = len(split(range(problem.num_ranks))) == problem.num_ranks
    if upper_bound is not None and at_once and problem.num_slots == problem.num_experts:
        bound = max(bound, 1.0 - upper_bound / total)
    return Solution(
        placement,
        lower_bound=bound,
        bound_of="cross_rank_fraction",
        termination=termination,
        notes={"integer_program": ", ".join(dict.fromkeys(stage.program for stage in stages))},
    )


def _place_parts(
    ranks: Ranks,
    among: Sequence[int],
    split: Split,
    flow: NDArray[np.float64],
    sizes: NDArray[np.int64],
    rng: np.random.Generator,
    budget: Budget,
    backend: Backend,
) -> list[Stage]:
    """Experts to the ranks `among`, in place, stage by stage; the stages.

    Half of the time goes to a stage that others follow; the rest is shared by these.

    Args:
        ranks: [L, E] rank of each expert so far; those on among[0] are to be placed.
        split: ranks into the parts that the next stage tells apart.
        flow: [L-1, E, E] between experts of neighbouring layers.
        sizes: [G] experts of each rank.
    """
    parts = split(among) if len(among) > 1 else [among]
    here = np.stack([np.nonzero(row == among[0])[0] for row in ranks])
    if len(parts) == 1 or here.shape[1] == 0:
        return []
    inside = np.stack(
        [layer_flow[np.ix_(here[layer], here[layer + 1])] for layer, layer_flow in enumerate(flow)]
    )
    is_last = all(len(part) == 1 for part in parts)
    part_sizes = np.array([sizes[list(part)].sum() for part in parts])
    stages = [place(inside, part_sizes, rng, budget if is_last else budget.part(0.5), backend)]
    first = np.array([part[0] for part in parts])
    np.put_along_axis(ranks, here, first[stages[0].ranks], axis=1)
    if not is_last:
        for number, part in enumerate(parts):
            share = budget.part(1 / (len(parts) - number))
            stages += _place_parts(ranks, part, split, flow, sizes, rng, share, backend)
    return stages


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
    return improve(flow, sizes, ranks, budget, backend)


def improve(
    flow: NDArray[np.float64],
    sizes: NDArray[np.int64],
    ranks: Ranks,
    budget: Budget,
    backend: Backend,
) -> Stage:
    """The integer program, from ranks [L, E], where it is within reach."""
    num_layers, num_experts = ranks.shape
    if budget.expired() or not _is_small(num_layers, num_experts, sizes, MAX_IMPLICATIONS[backend]):
        return Stage(ranks, None, "not run", budget.expired())
    weights, scale = to_integers(flow)
    program, pairs = _program(weights, int(sizes[0]))
    answer = solve(program, backend, _shared(ranks, pairs), EFFORT, budget)
    found = _ranks(answer.values, pairs, num_layers, num_experts)
    if kept_flow(flow, found) > kept_flow(flow, ranks):
        ranks = found
    return Stage(
        ranks,
        None if answer.upper_bound is None else answer.upper_bound / scale,
        "optimal" if answer.optimal else "not proved",
        budget.expired(),
    )


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


def _program(weights: NDArray[np.int64], rank_size: int) -> tuple[IntegerProgram, Pairs]:
    """The integer program, and the number of s_uv by (u, v), u < v; expert e of layer l is l E + e.

    Args:
        weights: [L-1, E, E] flow.
        rank_size: E/G.
    """
    num_layers, num_experts = len(weights) + 1, weights.shape[1]
    layers = [range(layer * num_experts, (layer + 1) * num_experts) for layer in range(num_layers)]
    program = IntegerProgram()
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


def _shared(ranks: Ranks, pairs: Pairs) -> Point:
    """The point of the program that is a placement."""
    flat = ranks.ravel()
    u, v = np.array(list(pairs)).T
    same: Point = (flat[u] == flat[v]).astype(np.int64)
    return same


def _ranks(values: Point, pairs: Pairs, num_layers: int, num_experts: int) -> Ranks:
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

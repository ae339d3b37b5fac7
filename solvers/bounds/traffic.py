"""Lower bounds on span and messages.

Span. A token's span is the sum of 1 / n over its experts, where n counts its experts on the same
rank. 1 / n is convex, so the pairs that may be kept (of each expert, and in all) bound the sum:
they are best spent on first partners of as many experts as possible, then on second ones. Also, k
experts need ceil(k / s) ranks.

Messages. alltoall: the same sum over the experts that are not at the token's home; those that are
are at most as many as if each expert sat on the home rank where most tokens want it (an assignment
problem), and, for each rank, as its s most wanted experts draw. coherent: the experts where the
primary of the previous layer was are bounded by a b-matching. Nodes are ranks with more slots.

Complexity: O(L T K^2) to count pairs, one transport problem per layer. Source: placer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.groups import Groups
from solvers.bounds.transport import flow_kept, has_ended, largest, pairs_kept
from solvers.budget import Budget
from solvers.problem import Problem

Floats = NDArray[np.float64]


def traffic_bound(problem: Problem, budget: Budget | None = None) -> float | None:
    """Messages of the dispatch + node_weight x node messages, or what they cost by `link_cost`.

    With several workloads: what `robust` makes of their bounds. A message costs at least as much as
    over the cheapest link. Layers that half of the budget does not reach are left to prices
    (`solvers.bounds.transport`); where all of it ends, only room is counted.
    """
    if problem.dispatch == "allgather":
        return problem.num_ranks - 1 + problem.node_weight * (problem.num_nodes - 1)
    if problem.tokens is None:
        if problem.coactivation is None:
            return None
        return sum(
            weight * _messages_pairwise(problem, problem.coactivation, groups)
            for groups, weight in _levels(problem)
        )
    levels = _levels(problem)
    if problem.link_cost is not None:
        apart = ~np.eye(problem.num_ranks, dtype=bool)
        levels = [(Groups.ranks(problem), float(problem.link_cost[apart].min(initial=np.inf)))]
        if problem.num_ranks == 1:
            return 0.0
    workload = problem.token_workload
    found = [
        _over_tokens(_tokens_of(problem, workload == number), levels, budget)
        for number in range(problem.num_workloads)
    ]
    return float(problem.aggregate(np.array(found))) if len(found) > 1 else found[0]


def node_traffic_bound(problem: Problem, budget: Budget) -> float:
    """The part of `traffic_bound` that is messages between nodes; one workload, with tokens."""
    return _over_tokens(problem, _levels(problem)[1:], budget)


def _over_tokens(
    problem: Problem, levels: list[tuple[Groups, float]], budget: Budget | None
) -> float:
    """What messages cost, mean over tokens and layers."""
    assert problem.tokens is not None
    exact = None if budget is None else budget.part(0.5)
    total = 0.0
    for layer in range(problem.num_layers):
        experts = problem.tokens[:, layer]
        if has_ended(budget):
            total += sum(weight * _messages_for_room(problem, experts, g) for g, weight in levels)
            continue
        counts, hurried = _Counts.of(experts, problem.num_experts), has_ended(exact)
        for groups, weight in levels:
            total += weight * _messages(problem, layer, counts, groups, hurried)
    return total / float(problem.tokens.shape[0] * problem.num_layers)


def _levels(problem: Problem) -> list[tuple[Groups, float]]:
    """What messages go between, and what each costs."""
    levels = [(Groups.ranks(problem), 1.0)]
    if problem.num_nodes > 1 and problem.node_weight > 0:
        levels.append((Groups.nodes(problem), problem.node_weight))
    return levels


def _tokens_of(problem: Problem, chosen: NDArray[np.bool_]) -> Problem:
    """The problem of some of the tokens."""
    if chosen.all():
        return problem
    assert problem.tokens is not None
    return replace(
        problem,
        tokens=problem.tokens[chosen],
        primary=None if problem.primary is None else problem.primary[chosen],
        home=None if problem.home is None else problem.home[chosen],
        batch=None,
        scenario=None,
        scenario_load=None,
        folds=False,
        workload=None,
    )


def layer_bounds(problem: Problem, figure: str, budget: Budget | None = None) -> Floats:
    """[L] bounds on the sum over all tokens of span, messages_alltoall or messages_coherent.

    Layers that the budget does not reach are left to prices (`solvers.bounds.transport`).
    """
    groups, tokens = Groups.ranks(problem), problem.tokens
    assert tokens is not None
    if figure != "span":
        problem = replace(problem, dispatch="coherent" if "coherent" in figure else "alltoall")
    found = np.zeros(problem.num_layers)
    for layer in range(problem.num_layers):
        counts, hurried = _Counts.of(tokens[:, layer], problem.num_experts), has_ended(budget)
        if figure == "span":
            span = _span(counts, groups, *pairs_kept(counts.pairs, groups, hurried))
            found[layer] = max(span, float(counts.tokens_using[1:].sum()))
        else:
            found[layer] = _messages(problem, layer, counts, groups, hurried)
    return found


@dataclass(frozen=True, eq=False)
class _Counts:
    """What bounds need to know of the tokens of one layer.

    Attributes:
        tokens_using: [K+1] tokens by their number of experts.
        wanted: [K+1, E] of them, tokens by their number of experts that use an expert.
        pairs: [E, E] tokens that chose both of two different experts.
    """

    tokens_using: NDArray[np.int64]
    wanted: NDArray[np.int64]
    pairs: Floats

    @staticmethod
    def of(tokens: NDArray[np.integer], num_experts: int) -> _Counts:
        """Count the experts [T, K] of each token, -1 = unused."""
        from solvers.bounds.traffic_kernels import count_pairs

        width = tokens.shape[1]
        using = np.zeros(width + 1, np.int64)
        wanted = np.zeros((width + 1, num_experts), np.int64)
        pairs = np.zeros((num_experts, num_experts))
        count_pairs(np.ascontiguousarray(tokens), using, wanted, pairs)
        return _Counts(using, wanted, pairs + pairs.T)


def _messages(
    problem: Problem, layer: int, counts: _Counts, groups: Groups, hurried: bool
) -> float:
    """Messages between groups in one layer, all tokens."""
    tokens = problem.tokens
    assert tokens is not None
    kept = pairs_kept(counts.pairs, groups, hurried)
    span = _span(counts, groups, *kept)
    # a token with experts has a span of at least one, and at most one of its ranks is its home
    span_less_one = max(0.0, span - float(counts.tokens_using[1:].sum()))
    if problem.dispatch == "coherent" and layer > 0:
        at_home = _pairs_after_primary(problem, tokens, layer, groups, hurried)
    elif problem.home is not None:
        home = problem.home.astype(np.int64) // groups.size
        at_home = _pairs_at_home(tokens[:, layer, :], home, problem.num_experts, groups)
    else:
        out = span * (1 - 1 / groups.number)
        return out + (span_less_one if problem.dispatch == "coherent" else 0.0)
    out = max(span_less_one, _span(counts, groups, *kept, at_home))
    return out + (span_less_one if problem.dispatch == "coherent" else 0.0)


def _messages_for_room(problem: Problem, experts: NDArray[np.integer], groups: Groups) -> float:
    """Messages in one layer because experts [T, K] do not fit one group, as `_messages`, weaker."""
    used = (experts >= 0).sum(axis=1)
    beyond_one = -(-used // groups.capacity) - (used > 0)
    return float(beyond_one.sum()) * (2 if problem.dispatch == "coherent" else 1)


def _span(
    counts: _Counts, groups: Groups, each: Floats, both: float, at_home: float = 0.0
) -> float:
    """Lower bound on the summed span of one layer's tokens, without experts at home.

    Args:
        counts: of the layer's tokens.
        each, both: from `pairs_kept`.
        at_home: token-expert pairs, at most, that are served at the token's home and do not count.
    """
    num_used = np.arange(len(counts.tokens_using))
    room = float(counts.tokens_using @ -(-num_used // groups.capacity)) - at_home
    # 1 / n = 1 - 1/2 - 1/6 - ...: all experts get their first partner before any the second
    away = max(0.0, float(counts.wanted.sum()) - at_home)
    span = away
    for partners in range(1, min(num_used.size - 1, groups.capacity)):
        spent = np.minimum(each, counts.wanted[partners + 1 :].sum(axis=0))
        each = each - spent
        kept = min(both, float(spent.sum()), away)
        both -= kept
        span -= kept / (partners * (partners + 1))
    return max(room, span)


def _pairs_at_home(
    experts: NDArray[np.integer], home: NDArray[np.int64], num_experts: int, groups: Groups
) -> float:
    """Upper bound on the token-expert pairs that are served at the token's home.

    Args:
        experts: [T, K] of each token, -1 = unused.
        home: [T] its home.
    """
    from solvers.bounds.traffic_kernels import count_choices

    wanted = np.zeros((groups.number, num_experts))
    count_choices(home, np.ascontiguousarray(experts), wanted)
    bound = float(largest(wanted, groups.capacity).sum())
    if groups.spare == 0:
        from solvers.assignment import assign

        profit = np.ascontiguousarray(wanted.T)
        rank = assign(profit, np.full(groups.number, groups.capacity))
        return min(bound, float(profit[np.arange(num_experts), rank].sum()))
    most_first = -np.sort(-wanted, axis=0)
    gains = np.sort(most_first[1:].ravel())[::-1]
    return min(bound, float(most_first[0].sum() + gains[: groups.spare].sum()))


def _pairs_after_primary(
    problem: Problem, tokens: NDArray[np.integer], layer: int, groups: Groups, hurried: bool
) -> float:
    """Upper bound on the pairs that are served where the last layer's primary expert was."""
    from solvers.bounds.traffic_kernels import count_choices

    before, experts = tokens[:, layer - 1, :], np.ascontiguousarray(tokens[:, layer, :])
    if problem.primary is None:
        primary = before[:, 0].astype(np.int64)
    else:
        primary = problem.primary[:, layer - 1].astype(np.int64)
        primary = np.where((before == primary[:, None]).any(axis=1), primary, -1)
    elsewhere = float((experts[primary < 0] >= 0).sum())
    flow = np.zeros((problem.num_experts, problem.num_experts))
    count_choices(primary, experts, flow)
    if groups.spare == 0:
        return elsewhere + flow_kept(flow, groups, hurried)
    copies = min(groups.number * groups.size, 1 + groups.spare)
    return elsewhere + float(largest(flow, copies * groups.capacity).sum())


def _messages_pairwise(problem: Problem, coactivation: Floats, groups: Groups) -> float:
    """Bound on the stand-in for messages that `solvers.check` defines without tokens."""
    total = 0.0
    for layer, together in enumerate(coactivation):
        load = float(np.trace(together))
        pairs = float(together.sum()) - load
        per_token = 1.0 + (pairs / load if load > 0 else 0.0)
        kept = min(pairs, pairs_kept(together, groups)[1])
        span = 1.0 + ((per_token - 1.0) * (1.0 - kept / pairs) if pairs > 0 else 0.0)
        if problem.dispatch != "coherent":
            total += span * (1 - 1 / groups.number)
            continue
        share = 1 / groups.number  # of the span, that is at home
        if layer > 0 and problem.primary_affinity is not None:
            flow = problem.primary_affinity[layer - 1]
            if flow.sum() > 0:
                within = flow_kept(flow, groups) * per_token / float(flow.sum())
                share = within / per_token
        total += max(span * (2 - share) - 1, 2 * span - 2)
    return total / len(coactivation)

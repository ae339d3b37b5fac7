"""Cheap lower bounds that hold for every sound placement of a problem.

Each is proven on the very arrays from which `solvers.check` computes the value, for every choice of
copies where there are redundant slots. None uses the cap on imbalance, which could only raise them.

Load. Without redundant slots a rank holds exactly s experts. Among the kG + 1 hottest some rank
holds k + 1, so its load is at least that of the k + 1 coolest of them and of the s - k - 1 coolest
of all. With redundant slots: the least possible largest load per copy. Always: the mean.

Flow and pairs kept within ranks. A rank has s slots, so an expert meets at most s experts of the
next layer and s - 1 of its own: sharing is a 0/1 matrix whose rows and columns sum to at most that.
The best such matrix is a transport problem, which is integral (b-matching). With redundant slots
only rows are limited, an expert with c copies to c times as many, and spare slots are shared out
greedily, which is optimal since an expert's gains fall with every further copy.

Span. A token's span is the sum of 1 / n over its experts, where n counts its experts on the same
rank. 1 / n is convex, so the pairs that may be kept (of each expert, and in all) bound the sum:
they are best spent on first partners of as many experts as possible, then on second ones. Also, k
experts need ceil(k / s) ranks.

Messages. alltoall: the same sum over the experts that are not at the token's home; those that are
are at most as many as if each expert sat on the home rank where most tokens want it (an assignment
problem), and, for each rank, as its s most wanted experts draw. coherent: the experts where the
primary of the previous layer was are bounded by a b-matching. Nodes are ranks with more slots.

Complexity: O(L T K^2) to count pairs, one min-cost flow on E^2 arcs per layer. Source: placer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.check import num_tokens
from solvers.problem import Problem

Floats = NDArray[np.float64]
_ROUNDING = 1e-11  # relative; every bound is lowered by it


def lower_bound(problem: Problem) -> float | None:
    """A bound on the problem's objective; None if there is nothing to prove it on."""
    if problem.objective == "balance":
        return imbalance_bound(problem) * (1 - _ROUNDING)
    traffic = traffic_bound(problem)
    if traffic is None:
        return None
    if problem.objective == "latency":
        tokens_per_rank = num_tokens(problem) / problem.num_ranks
        traffic = (
            problem.latency_load_us * float(rank_load_bound(problem).mean())
            + problem.latency_message_us * traffic * tokens_per_rank
        )
    return max(0.0, traffic * (1 - _ROUNDING))


def rank_load_bound(problem: Problem) -> Floats:
    """[L] load of the busiest rank."""
    spare = problem.num_slots - problem.num_experts
    bound: Floats = problem.load.sum(axis=1) / problem.num_ranks
    for layer, load in enumerate(problem.load):
        if spare:
            bound[layer] = max(bound[layer], _load_per_copy(load, spare, problem.num_ranks))
        else:
            bound[layer] = max(bound[layer], _pigeonhole(load, problem.num_ranks))
    return bound


def imbalance_bound(problem: Problem) -> float:
    """Mean over layers of max / mean rank load."""
    mean = problem.load.sum(axis=1) / problem.num_ranks
    bound = rank_load_bound(problem)
    return float(np.divide(bound, mean, out=np.ones_like(mean), where=mean > 0).mean())


def traffic_bound(problem: Problem) -> float | None:
    """Messages of the dispatch + node_weight x node messages."""
    if problem.dispatch == "allgather":
        return problem.num_ranks - 1 + problem.node_weight * (problem.num_nodes - 1)
    levels = [(_Groups.ranks(problem), 1.0)]
    if problem.num_nodes > 1 and problem.node_weight > 0:
        levels.append((_Groups.nodes(problem), problem.node_weight))
    if problem.tokens is not None:
        if problem.tokens.shape[0] == 0:
            return 0.0
        layers = range(problem.num_layers)
        total = sum(
            weight * _messages(problem, problem.tokens, layer, counts, groups)
            for layer in layers
            for counts in [_Counts.of(problem.tokens[:, layer, :], problem.num_experts)]
            for groups, weight in levels
        )
        return total / float(problem.tokens.shape[0] * problem.num_layers)
    if problem.coactivation is not None:
        return sum(
            weight * _messages_pairwise(problem, problem.coactivation, groups)
            for groups, weight in levels
        )
    return None


def kept_flow_bound(flow: Floats, problem: Problem) -> float:
    """Upper bound on the flow [L-1, E, E] between layers that stays on its rank."""
    groups = _Groups.ranks(problem)
    return sum(_flow_kept(layer_flow, groups) for layer_flow in flow) * (1 + _ROUNDING)


def to_integers(weights: Floats) -> tuple[NDArray[np.int64], float]:
    """Weights times a scale, as integers, none of them less than before.

    Affinity is a sum of fractions 1 / (k k'), so there is often a small exact scale.
    """
    total = float(weights.sum())
    for scale in range(1, 65):
        scaled = weights * scale
        if (np.abs(scaled - np.rint(scaled)) <= _ROUNDING * np.maximum(1.0, scaled)).all():
            return np.rint(scaled).astype(np.int64), float(scale)
    scale_to_sum = 1e9 / total
    return np.ceil(weights * scale_to_sum).astype(np.int64), scale_to_sum


@dataclass(frozen=True)
class _Groups:
    """Ranks, or nodes, as places that hold experts.

    Attributes:
        number: of groups.
        capacity: experts that one group can hold in a layer.
        spare: slots per layer beyond one for each expert, over all groups.
        size: ranks of a group.
    """

    number: int
    capacity: int
    spare: int
    size: int

    @staticmethod
    def ranks(problem: Problem) -> _Groups:
        spare = problem.num_slots - problem.num_experts
        return _Groups(problem.num_ranks, problem.slots_per_rank, spare, 1)

    @staticmethod
    def nodes(problem: Problem) -> _Groups:
        spare = problem.num_slots - problem.num_experts
        size = problem.ranks_per_node
        return _Groups(problem.num_nodes, problem.slots_per_rank * size, spare, size)


def _pigeonhole(load: Floats, num_ranks: int) -> float:
    hottest = np.sort(load)[::-1]
    slots = load.size // num_ranks
    coolest = np.concatenate(([0.0], np.cumsum(hottest[::-1])))
    return max(
        float(hottest[k * num_ranks - k : k * num_ranks + 1].sum() + coolest[slots - k - 1])
        for k in range(slots)
    )


def _load_per_copy(load: Floats, spare: int, max_copies: int) -> float:
    """Least possible largest load per copy: each spare slot to where it is needed most."""
    copies = np.ones(load.size, np.int64)
    for _ in range(spare):
        hottest = int((load / copies).argmax())
        if copies[hottest] == max_copies:
            break
        copies[hottest] += 1
    return float((load / copies).max())


def _transport(weights: Floats, row_limit: int, column_limit: int) -> float:
    """Upper bound on sum(weights M), M in [0, 1], with limited row and column sums.

    The problem is integral; it is solved exactly in integers, in which weights are rounded up.
    """
    num_rows, num_columns = weights.shape
    if min(row_limit, column_limit) <= 0 or not weights.any():
        return 0.0
    if row_limit >= num_columns and column_limit >= num_rows:
        return float(weights.sum())
    from ortools.graph.python import min_cost_flow

    integers, scale = to_integers(weights)
    flow = min_cost_flow.SimpleMinCostFlow()
    i, j = np.nonzero(integers)
    source, sink = num_rows + num_columns, num_rows + num_columns + 1
    rows, columns = np.arange(num_rows), np.arange(num_columns)
    supply = min(num_rows * row_limit, num_columns * column_limit)
    arcs = [
        (np.full(num_rows, source), rows, np.full(num_rows, row_limit), np.zeros(num_rows)),
        (i, num_rows + j, np.ones(i.size), -integers[i, j]),
        (
            num_rows + columns,
            np.full(num_columns, sink),
            np.full(num_columns, column_limit),
            np.zeros(num_columns),
        ),
        (np.array([source]), np.array([sink]), np.array([supply]), np.zeros(1)),
    ]
    tail, head, capacity, cost = (
        np.concatenate([np.asarray(arc[part], np.int64) for arc in arcs]) for part in range(4)
    )
    flow.add_arcs_with_capacity_and_unit_cost(
        tail.astype(np.int32), head.astype(np.int32), capacity, cost
    )
    flow.set_nodes_supplies(np.array([source, sink], np.int32), np.array([supply, -supply]))
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError("the min-cost flow of a transport problem was not solved")
    return -float(flow.optimal_cost()) / scale


def _flow_kept(flow: Floats, groups: _Groups) -> float:
    if groups.spare == 0:
        return _transport(flow, groups.capacity, groups.capacity)
    # each copy of the row serves an equal share, next to at most `capacity` columns
    return float(_largest(flow, groups.capacity).sum())


def _largest(weights: Floats, count: int) -> Floats:
    """[rows] sum of the `count` largest entries of each row."""
    if count <= 0:
        return np.zeros(len(weights))
    if count >= weights.shape[1]:
        count = weights.shape[1]
    largest: Floats = np.partition(weights, -count, axis=1)[:, -count:].sum(axis=1)
    return largest


def _pairs_kept(pairs: Floats, groups: _Groups) -> tuple[Floats, float]:
    """Upper bounds on co-activated pairs within groups: [E] of each expert, and twice their number.

    Args:
        pairs: [E, E] tokens that chose both experts; the diagonal does not matter.
    """
    pairs = pairs - np.diag(np.diag(pairs))
    partners = groups.capacity - 1
    if groups.spare == 0:
        return _largest(pairs, partners), _transport(pairs, partners, partners)
    max_copies = min(groups.number * groups.size, 1 + groups.spare)
    largest_first = np.concatenate(
        (np.zeros((len(pairs), 1)), np.cumsum(-np.sort(-pairs, axis=1), axis=1)), axis=1
    )
    counts = np.minimum(np.arange(1, max_copies + 1) * partners, len(pairs))
    with_copies = largest_first[:, counts]
    gains = np.sort(np.diff(with_copies, axis=1).ravel())[::-1]
    total = float(with_copies[:, 0].sum() + gains[: groups.spare].sum())
    return with_copies[:, -1], total


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
        experts = tokens.astype(np.int64)
        width = experts.shape[1]
        used = (experts >= 0).sum(axis=1)
        key = (used[:, None] * num_experts + experts)[experts >= 0]
        wanted = np.bincount(key, minlength=(width + 1) * num_experts)
        pairs = np.zeros(num_experts * num_experts)
        for a in range(width):
            for b in range(a + 1, width):
                both = (experts[:, a] >= 0) & (experts[:, b] >= 0)
                pair = experts[both, a] * num_experts + experts[both, b]
                pairs += np.bincount(pair, minlength=pairs.size)
        square = pairs.reshape(num_experts, num_experts)
        return _Counts(
            np.bincount(used, minlength=width + 1),
            wanted.reshape(width + 1, num_experts),
            square + square.T,
        )


def _messages(
    problem: Problem, tokens: NDArray[np.integer], layer: int, counts: _Counts, groups: _Groups
) -> float:
    """Messages between groups in one layer, all tokens."""
    kept = _pairs_kept(counts.pairs, groups)
    span = _span(counts, groups, *kept)
    # a token with experts has a span of at least one, and at most one of its ranks is its home
    span_less_one = max(0.0, span - float(counts.tokens_using[1:].sum()))
    if problem.dispatch == "coherent" and layer > 0:
        at_home = _pairs_after_primary(problem, tokens, layer, groups)
    elif problem.home is not None:
        home = problem.home.astype(np.int64) // groups.size
        at_home = _pairs_at_home(tokens[:, layer, :], home, problem.num_experts, groups)
    else:
        out = span * (1 - 1 / groups.number)
        return out + (span_less_one if problem.dispatch == "coherent" else 0.0)
    out = max(span_less_one, _span(counts, groups, *kept, at_home))
    return out + (span_less_one if problem.dispatch == "coherent" else 0.0)


def _span(
    counts: _Counts, groups: _Groups, each: Floats, both: float, at_home: float = 0.0
) -> float:
    """Lower bound on the summed span of one layer's tokens, without experts at home.

    Args:
        counts: of the layer's tokens.
        each, both: from `_pairs_kept`.
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
    experts: NDArray[np.integer], home: NDArray[np.int64], num_experts: int, groups: _Groups
) -> float:
    """Upper bound on the token-expert pairs that are served at the token's home.

    Args:
        experts: [T, K] of each token, -1 = unused.
        home: [T] its home.
    """
    key = (home[:, None] * num_experts + experts)[experts >= 0]
    wanted = (
        np.bincount(key, minlength=groups.number * num_experts)
        .reshape(groups.number, num_experts)
        .astype(np.float64)
    )
    bound = float(_largest(wanted, groups.capacity).sum())
    if groups.spare == 0:
        from solvers.assignment import assign

        profit = np.ascontiguousarray(wanted.T)
        rank = assign(profit, np.full(groups.number, groups.capacity))
        return min(bound, float(profit[np.arange(num_experts), rank].sum()))
    most_first = -np.sort(-wanted, axis=0)
    gains = np.sort(most_first[1:].ravel())[::-1]
    return min(bound, float(most_first[0].sum() + gains[: groups.spare].sum()))


def _pairs_after_primary(
    problem: Problem, tokens: NDArray[np.integer], layer: int, groups: _Groups
) -> float:
    """Upper bound on the pairs that are served where the last layer's primary expert was."""
    before, experts = tokens[:, layer - 1, :], tokens[:, layer, :].astype(np.int64)
    if problem.primary is None:
        primary = before[:, 0].astype(np.int64)
    else:
        primary = problem.primary[:, layer - 1].astype(np.int64)
        primary = np.where((before == primary[:, None]).any(axis=1), primary, -1)
    moved = primary >= 0
    elsewhere = float((experts[~moved] >= 0).sum())
    num_experts = problem.num_experts
    key = (primary[moved][:, None] * num_experts + experts[moved])[experts[moved] >= 0]
    flow = np.bincount(key, minlength=num_experts**2).reshape(num_experts, -1).astype(np.float64)
    if groups.spare == 0:
        return elsewhere + _transport(flow, groups.capacity, groups.capacity)
    copies = min(groups.number * groups.size, 1 + groups.spare)
    return elsewhere + float(_largest(flow, copies * groups.capacity).sum())


def _messages_pairwise(problem: Problem, coactivation: Floats, groups: _Groups) -> float:
    """Bound on the stand-in for messages that `solvers.check` defines without tokens."""
    total = 0.0
    for layer, together in enumerate(coactivation):
        load = float(np.trace(together))
        pairs = float(together.sum()) - load
        per_token = 1.0 + (pairs / load if load > 0 else 0.0)
        kept = min(pairs, _pairs_kept(together, groups)[1])
        span = 1.0 + ((per_token - 1.0) * (1.0 - kept / pairs) if pairs > 0 else 0.0)
        if problem.dispatch != "coherent":
            total += span * (1 - 1 / groups.number)
            continue
        share = 1 / groups.number  # of the span, that is at home
        if layer > 0 and problem.primary_affinity is not None:
            flow = problem.primary_affinity[layer - 1]
            if flow.sum() > 0:
                within = _flow_kept(flow, groups) * per_token / float(flow.sum())
                share = within / per_token
        total += max(span * (2 - share) - 1, 2 * span - 2)
    return total / len(coactivation)

"""Flow and pairs kept within ranks, bounded by a transport problem.

A rank has s slots, so an expert meets at most s experts of the next layer and s - 1 of its own:
sharing is a 0/1 matrix whose rows and columns sum to at most that. The best such matrix is a
transport problem, which is integral (b-matching). With redundant slots only rows are limited, an
expert with c copies to c times as many, and spare slots are shared out greedily, which is optimal
since an expert's gains fall with every further copy.

A budget that has ended leaves a layer to prices: for any u, v >= 0 of rows and columns, with limits
r and c,

    r x sum of u  +  c x sum of v  +  sum of max(w_ij - u_i - v_j, 0)

is a bound too (duality), some tenths of a percent higher after three rounds that halve the distance
to the best u for v, and to the best v for u.

Complexity: one min-cost flow on E^2 arcs per layer, or O(E^2). Source: placer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.groups import Groups
from solvers.budget import Budget
from solvers.problem import Problem

Floats = NDArray[np.float64]
ROUNDING = 1e-11  # relative; every bound is lowered by it
_PRICE_ROUNDS = 3


def kept_flow_bound(flow: Floats, problem: Problem, budget: Budget | None = None) -> float:
    """Upper bound on the flow [L-1, E, E] between layers that stays on its rank."""
    groups = Groups.ranks(problem)
    kept = sum(flow_kept(layer_flow, groups, has_ended(budget)) for layer_flow in flow)
    return kept * (1 + ROUNDING)


def affinity_bound(problem: Problem, budget: Budget | None = None) -> float | None:
    """Lower bound on the cross-rank fraction; None without affinity."""
    if problem.affinity is None or problem.num_layers < 2:
        return None
    total = float(problem.affinity.sum())
    return share_cut(kept_flow_bound(problem.affinity, problem, budget), total)


def coactivation_bound(problem: Problem, budget: Budget | None = None) -> float | None:
    """Lower bound on the share of co-activated pairs that is cut; None without co-activation."""
    if problem.coactivation is None:
        return None
    pairs = problem.coactivation * (1.0 - np.eye(problem.num_experts))
    return share_cut(kept_pairs_bound(pairs, problem, budget), float(pairs.sum()))


def share_cut(kept: float, total: float) -> float:
    """One less the share that may stay; the rounding of the value itself is allowed for."""
    return max(0.0, 1.0 - min(total, kept) / total - ROUNDING) if total > 0 else 0.0


def kept_pairs_bound(pairs: Floats, problem: Problem, budget: Budget | None = None) -> float:
    """Upper bound on the pairs [L, E, E] of a layer's experts that share a rank, both ways."""
    groups = Groups.ranks(problem)
    kept = sum(pairs_kept(together, groups, has_ended(budget))[1] for together in pairs)
    return kept * (1 + ROUNDING)


def has_ended(budget: Budget | None) -> bool:
    """Whether the rest is left to prices."""
    return budget is not None and budget.expired()


def flow_kept(flow: Floats, groups: Groups, hurried: bool = False) -> float:
    """Upper bound on the flow [E, E] between two layers within groups; `hurried`: by prices."""
    if groups.spare == 0:
        bound = price_bound if hurried else transport_bound
        return bound(flow, groups.capacity, groups.capacity)
    # each copy of the row serves an equal share, next to at most `capacity` columns
    return float(largest(flow, groups.capacity).sum())


def pairs_kept(pairs: Floats, groups: Groups, hurried: bool = False) -> tuple[Floats, float]:
    """Upper bounds on co-activated pairs within groups: [E] of each expert, and twice their number.

    Args:
        pairs: [E, E] tokens that chose both experts; the diagonal does not matter.
        groups: ranks or nodes.
        hurried: by prices.
    """
    pairs = pairs - np.diag(np.diag(pairs))
    partners = groups.capacity - 1
    if groups.spare == 0:
        bound = price_bound if hurried else transport_bound
        return largest(pairs, partners), bound(pairs, partners, partners)
    max_copies = min(groups.number * groups.size, 1 + groups.spare)
    largest_first = np.concatenate(
        (np.zeros((len(pairs), 1)), np.cumsum(-np.sort(-pairs, axis=1), axis=1)), axis=1
    )
    counts = np.minimum(np.arange(1, max_copies + 1) * partners, len(pairs))
    with_copies = largest_first[:, counts]
    gains = np.sort(np.diff(with_copies, axis=1).ravel())[::-1]
    total = float(with_copies[:, 0].sum() + gains[: groups.spare].sum())
    return with_copies[:, -1], total


def transport_bound(weights: Floats, row_limit: int, column_limit: int) -> float:
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


def price_bound(weights: Floats, row_limit: int, column_limit: int) -> float:
    """The same, by prices: cheaper, and a little higher."""
    num_rows, num_columns = weights.shape
    if min(row_limit, column_limit) <= 0:
        return 0.0
    if row_limit >= num_columns or column_limit >= num_rows:
        return transport_bound(weights, row_limit, column_limit)

    def of_rows(left: Floats) -> Floats:
        """The prices that leave each row as many entries as its limit."""
        found: Floats = np.partition(left, -row_limit - 1, axis=1)[:, -row_limit - 1]
        return np.maximum(0.0, found)

    def of_columns(left: Floats) -> Floats:
        found: Floats = np.partition(left, -column_limit - 1, axis=0)[-column_limit - 1]
        return np.maximum(0.0, found)

    rows, columns = of_rows(weights) / 2, of_columns(weights) / 2
    for _ in range(_PRICE_ROUNDS):
        rows, columns = (
            (rows + of_rows(weights - columns)) / 2,
            (columns + of_columns(weights - rows[:, None])) / 2,
        )
    above = np.maximum(weights - rows[:, None] - columns, 0.0)
    bound = row_limit * float(rows.sum()) + column_limit * float(columns.sum())
    return (bound + float(above.sum())) * (1 + ROUNDING)


def largest(weights: Floats, count: int) -> Floats:
    """[rows] sum of the `count` largest entries of each row."""
    if count <= 0:
        return np.zeros(len(weights))
    if count >= weights.shape[1]:
        count = weights.shape[1]
    largest: Floats = np.partition(weights, -count, axis=1)[:, -count:].sum(axis=1)
    return largest


def to_integers(weights: Floats) -> tuple[NDArray[np.int64], float]:
    """Weights times a scale, as integers, none of them less than before.

    Affinity is a sum of fractions 1 / (k k'), so there is often a small exact scale.
    """
    total = float(weights.sum())
    for scale in range(1, 65):
        scaled = weights * scale
        if (np.abs(scaled - np.rint(scaled)) <= ROUNDING * np.maximum(1.0, scaled)).all():
            return np.rint(scaled).astype(np.int64), float(scale)
    scale_to_sum = 1e9 / total
    return np.ceil(weights * scale_to_sum).astype(np.int64), scale_to_sum

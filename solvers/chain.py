"""Keep the flow between neighbouring layers within ranks: assignments and dynamic programming.

Problem: given flow [L-1, E, E] between experts of neighbouring layers and rank sizes c_g,

    maximise sum_l sum_ij flow_l[i, j] [g_l(i) = g_l+1(j)],   |{i : g_l(i) = g}| = c_g

Method:

1. Alternating assignment. With its neighbours fixed, a layer is exactly a transport problem
   (`solvers.assignment`); layers are improved in turn, forwards and backwards, until none gains.
   After each pass the labels of all later layers are matched to those before (an assignment
   problem of ranks to ranks, exact for labels), which no single layer can do.
2. Recombination. Local optima of many starts differ in where along the chain they are good. Dynamic
   programming over the layers picks, among all the partitions of a layer that any of them uses, the
   best sequence; the value of two partitions next to each other is that of their best matching, so
   the labels do not matter. The result is at least as good as every start.
3. The winner is disturbed in random windows of layers, improved and recombined again.

Complexity: O(L (E^2 + transport)) per pass, O(L P^2 (E G + matching)) to recombine P placements.
Guarantee: none on the optimum; never worse than the contiguous placement. Source: placer; the
alternation is the classic one for layered assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget

Ranks = NDArray[np.int64]
_GAIN = 1e-12  # relative; less is rounding


@dataclass(frozen=True)
class Effort:
    """How long to look.

    Attributes:
        num_starts: random starting points.
        num_rounds, num_windows: rounds of disturbing and recombining, and windows in each.
    """

    num_starts: int
    num_rounds: int
    num_windows: int


def effort_for(num_layers: int, num_experts: int, num_ranks: int) -> Effort:
    """Less of it for larger chains: roughly equal work up to 256 experts in 60 layers."""
    pass_work = num_layers * num_experts * (num_experts + num_ranks**1.5)
    share = min(1.0, 3e5 / pass_work)
    return Effort(
        num_starts=max(2, round(48 * share)),
        num_rounds=max(2, round(24 * share**0.5)),
        num_windows=max(4, round(16 * share**0.5)),
    )


def contiguous_ranks(num_layers: int, sizes: NDArray[np.int64]) -> Ranks:
    """[L, E] experts in their order on ranks of the given sizes."""
    return np.tile(np.repeat(np.arange(sizes.size), sizes), (num_layers, 1))


def keep_flow(
    flow: NDArray[np.float64],
    sizes: NDArray[np.int64],
    rng: np.random.Generator,
    budget: Budget,
    effort: Effort,
) -> Ranks:
    """[L, E] rank of each expert.

    Args:
        flow: [L-1, E, E] between experts of neighbouring layers.
        sizes: [G] experts of each rank in each layer, non-increasing, E in total.
        rng: where randomness comes from.
        budget: when to stop; the best placement so far is returned.
        effort: when to stop, on any machine alike.
    """
    num_layers = len(flow) + 1
    best = contiguous_ranks(num_layers, sizes)
    if budget.expired() or np.count_nonzero(sizes) == 1:
        return best
    best = _improve(flow, best, sizes, budget)
    pool = [best]
    for _ in range(effort.num_starts):
        if budget.expired():
            break
        start = rng.permuted(contiguous_ranks(num_layers, sizes), axis=1)
        pool.append(_improve(flow, start, sizes, budget))
    best = _improve(flow, _recombine(flow, pool, sizes, budget), sizes, budget)
    for _ in range(effort.num_rounds):
        if budget.expired():
            break
        disturbed = [
            _improve(flow, _disturb(best, rng), sizes, budget) for _ in range(effort.num_windows)
        ]
        best = _improve(flow, _recombine(flow, [best, *disturbed], sizes, budget), sizes, budget)
    return best


def kept_flow(flow: NDArray[np.float64], ranks: Ranks) -> float:
    """Flow that stays on its rank."""
    return float(
        sum(
            flow[layer][ranks[layer][:, None] == ranks[layer + 1]].sum()
            for layer in range(len(flow))
        )
    )


def _improve(
    flow: NDArray[np.float64], ranks: Ranks, sizes: NDArray[np.int64], budget: Budget
) -> Ranks:
    """Alternating assignment and matching of labels until nothing gains."""
    from solvers.assignment import assign, layer_profit

    ranks = ranks.copy()
    num_layers, num_experts = ranks.shape
    no_flow, no_ranks = np.zeros((0, num_experts)), np.zeros(0, np.int64)
    profit = np.empty((num_experts, sizes.size))
    row = np.arange(num_experts)
    stale = np.ones(num_layers, bool)  # a neighbour has changed since the layer was assigned
    value = kept_flow(flow, ranks)
    while stale.any():
        for layer in [*range(num_layers), *range(num_layers - 2, 0, -1)]:
            if not stale[layer]:
                continue
            if budget.expired():
                return ranks
            first, last = layer == 0, layer == num_layers - 1
            layer_profit(
                no_flow if first else flow[layer - 1],
                no_ranks if first else ranks[layer - 1],
                no_flow.T if last else flow[layer],
                no_ranks if last else ranks[layer + 1],
                profit,
            )
            better = assign(profit, sizes)
            stale[layer] = False
            now = profit[row, ranks[layer]].sum()
            if profit[row, better].sum() > now * (1 + _GAIN):
                ranks[layer] = better
                stale[max(0, layer - 1) : layer] = True
                stale[layer + 1 : layer + 2] = True
        stale |= _match_labels(flow, ranks, sizes)
        new_value = kept_flow(flow, ranks)
        if new_value <= value * (1 + _GAIN):
            break
        value = new_value
    return ranks


def _match_labels(
    flow: NDArray[np.float64], ranks: Ranks, sizes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Rename the ranks of all layers but the first, in place, so that each fits the one before.

    Renaming all later layers alike changes nothing but the flow across that one boundary, so
    matching the boundaries one by one is exact.

    Returns:
        [L] whether a layer's flow to a neighbour has changed.
    """
    from solvers.assignment import assign, flow_between_ranks

    ones = np.ones(sizes.size, np.int64)
    unequal = sizes[:, None] != sizes
    rename = np.arange(sizes.size)
    changed = np.zeros(len(ranks), bool)
    for layer in range(len(flow)):
        ranks[layer + 1] = rename[ranks[layer + 1]]
        between = flow_between_ranks(flow[layer], ranks[layer], ranks[layer + 1], sizes.size)
        forbidden = -1.0 - between.sum()
        between[unequal] = forbidden
        match = assign(between, ones)
        same = np.trace(between)
        if between[np.arange(sizes.size), match].sum() > same + _GAIN * abs(same):
            back = np.argsort(match)
            ranks[layer + 1] = back[ranks[layer + 1]]
            rename = back[rename]
            changed[layer : layer + 2] = True
    return changed


def _recombine(
    flow: NDArray[np.float64], pool: list[Ranks], sizes: NDArray[np.int64], budget: Budget
) -> Ranks:
    """The best sequence of the partitions that the pool uses; its first one if cut short."""
    from solvers.assignment import match_partitions

    partitions = [
        np.unique(np.stack([_canonical(ranks[layer], sizes.size) for ranks in pool]), axis=0)
        for layer in range(len(flow) + 1)
    ]
    value = np.zeros(len(partitions[0]))
    arguments = []
    for layer, between in enumerate(flow):
        if budget.expired():
            return pool[0]
        value, argument = match_partitions(
            between,
            partitions[layer],
            partitions[layer + 1],
            value,
            sizes,
            1.0 + float(between.sum()),
        )
        arguments.append(argument)
    choice = [int(value.argmax())]
    for argument in reversed(arguments):
        choice.append(int(argument[choice[-1]]))
    ranks = np.stack([rows[index] for rows, index in zip(partitions, choice[::-1], strict=True)])
    _match_labels(flow, ranks, sizes)
    return ranks


def _canonical(ranks: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """The same partition with ranks named by size, largest first, then by their first expert."""
    size = np.bincount(ranks, minlength=num_ranks)
    first = np.full(num_ranks, ranks.size)
    np.minimum.at(first, ranks, np.arange(ranks.size))
    name = np.empty(num_ranks, np.int64)
    name[np.lexsort((first, -size))] = np.arange(num_ranks)
    named: NDArray[np.int64] = name[ranks]
    return named


def _disturb(ranks: Ranks, rng: np.random.Generator) -> Ranks:
    """Exchange the ranks of some experts of each layer in a random window of layers."""
    ranks = ranks.copy()
    num_layers, num_experts = ranks.shape
    width = int(rng.integers(1, min(10, num_layers) + 1))
    start = int(rng.integers(num_layers - width + 1))
    for layer in range(start, start + width):
        moved = rng.permutation(num_experts)[: int(rng.integers(2, num_experts + 1))]
        ranks[layer, moved] = ranks[layer, np.roll(moved, 1)]
    return ranks

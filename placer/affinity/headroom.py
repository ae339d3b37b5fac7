"""What a placement on G ranks can reach at best, and a random one on average, from counts alone.

Quick bounds for orientation: valid for any placement of every expert on one rank, with at most
ceil(E / G) experts per rank and layer, on the counted tokens. `solvers` proves tighter ones.

Shape letters: L layers, E experts, G ranks, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from placer.affinity.model import Affinity
from placer.affinity.skew import balance_bound


@dataclass(frozen=True, eq=False)
class Headroom:
    """Figures for G ranks; nan where there are no tokens.

    Attributes:
        num_ranks: G.
        imbalance_contiguous: [L] max / mean rank load with the experts in their order.
        imbalance_bound: [L] no placement has a smaller max / mean rank load.
        span_bound: [L] no placement has a smaller span.
        span_random: [L] mean span of a random placement of equally many experts per rank.
        affinity_bound: [L-1] no placement keeps a larger share of the affinity inside ranks; a
            random one keeps 1 / G.
        primary_bound: [L-1] the same for primary experts.
    """

    num_ranks: int
    imbalance_contiguous: NDArray[np.float64]
    imbalance_bound: NDArray[np.float64]
    span_bound: NDArray[np.float64]
    span_random: NDArray[np.float64]
    affinity_bound: NDArray[np.float64]
    primary_bound: NDArray[np.float64]


def headroom(affinity: Affinity, num_ranks: int) -> Headroom:
    """Bounds for `num_ranks` ranks, without redundant experts. O(L E^2 log E)."""
    capacity = -(-affinity.num_experts // num_ranks)
    used = np.arange(1, affinity.top_k + 1)
    fewest = -(-used // capacity)
    random = np.array(
        [random_span(affinity.num_experts, int(k), num_ranks) for k in used], np.float64
    )
    tokens_by_k = affinity.k_histogram[:, 1:]
    with np.errstate(invalid="ignore"):
        share_of_k = tokens_by_k / tokens_by_k.sum(axis=1, keepdims=True)
    return Headroom(
        num_ranks=num_ranks,
        imbalance_contiguous=contiguous_imbalance(affinity.load, num_ranks),
        imbalance_bound=balance_bound(affinity.load, num_ranks),
        span_bound=share_of_k @ fewest,
        span_random=share_of_k @ random,
        affinity_bound=kept_bound(affinity.affinity, capacity),
        primary_bound=kept_bound(affinity.primary_pairs, capacity),
    )


def contiguous_imbalance(load: NDArray[np.int64], num_ranks: int) -> NDArray[np.float64]:
    """[L] max / mean rank load of loads [L, E] when ranks hold consecutive experts, as evenly split
    as whole experts allow; nan without load."""
    parts = np.array_split(np.arange(load.shape[1]), num_ranks)
    rank_load = np.stack([load[:, part].sum(axis=1) for part in parts], axis=1)
    with np.errstate(invalid="ignore"):
        ratio: NDArray[np.float64] = rank_load.max(axis=1) / rank_load.mean(axis=1)
    return ratio


def kept_bound(table: NDArray[np.number], capacity: int) -> NDArray[np.float64]:
    """[L-1] upper bound on the share of tables [L-1, E, E] that can stay inside ranks.

    An expert shares its rank with at most `capacity` experts of the next layer, so at most its
    largest `capacity` entries stay; likewise for columns. The smaller of both sums bounds.
    """
    size = table.shape[-1]
    cut = max(size - capacity, 0)
    by_row = np.partition(table, min(cut, size - 1), axis=2)[:, :, cut:].sum(axis=(1, 2))
    by_column = np.partition(table, min(cut, size - 1), axis=1)[:, cut:, :].sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        share: NDArray[np.float64] = np.minimum(by_row, by_column) / table.sum(axis=(1, 2))
    return share


def random_span(num_experts: int, k: int, num_ranks: int) -> float:
    """Mean number of ranks that hold k given experts, over placements drawn at random.

    Every rank holds E / G experts, some one more than others where G does not divide E: the sum
    over ranks of 1 - C(E - size, k) / C(E, k). nan where k > E.
    """
    if k > num_experts:
        return float("nan")
    large = num_experts % num_ranks
    span = 0.0
    for rank in range(num_ranks):
        size = num_experts // num_ranks + (rank < large)
        span += 1 - comb(num_experts - size, k) / comb(num_experts, k)
    return span

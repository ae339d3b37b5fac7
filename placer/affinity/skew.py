"""How unevenly a layer's load is spread over its experts, and what balance that still allows.

Shape letters: L layers, E experts, G ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LoadSkew:
    """Per layer; nan where the layer received no tokens.

    Attributes:
        max_over_mean: [L] load of the hottest expert / mean load.
        coefficient_of_variation: [L] standard deviation / mean load.
        gini: [L] Gini coefficient: 0 = all experts alike, (E-1)/E = one expert takes all.
        hottest_share: [L] share of all token-expert pairs that the hottest expert receives.
        never_used: [L] experts without a single token.
    """

    max_over_mean: NDArray[np.float64]
    coefficient_of_variation: NDArray[np.float64]
    gini: NDArray[np.float64]
    hottest_share: NDArray[np.float64]
    never_used: NDArray[np.int64]


def load_skew(load: NDArray[np.number]) -> LoadSkew:
    """Skew of load [L, E]. O(L E log E).

    The Gini coefficient is sum_i (2i - E - 1) x_i / (E sum x) over the loads x in rising order.
    """
    loads = np.asarray(load, np.float64)
    num_experts = loads.shape[1]
    with np.errstate(invalid="ignore"):
        share = loads / loads.sum(axis=1, keepdims=True)
    rank = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    return LoadSkew(
        max_over_mean=share.max(axis=1) * num_experts,
        coefficient_of_variation=share.std(axis=1) * num_experts,
        gini=(np.sort(share, axis=1) * rank).sum(axis=1) / num_experts,
        hottest_share=share.max(axis=1),
        never_used=(loads == 0).sum(axis=1, dtype=np.int64),
    )


def balance_bound(load: NDArray[np.number], num_ranks: int) -> NDArray[np.float64]:
    """[L] lower bound on max / mean rank load, with every expert on exactly one rank.

    Ranks hold at most ceil(E / G) experts each, so none holds fewer than
    F = E - (G-1) ceil(E / G). By the pigeonhole principle, for every j, some rank holds j + 1 of
    the jG + 1 hottest experts: at least the j + 1 coolest of these, and at least F - j - 1 more
    experts, the coolest of all. No placement without redundant experts is below the largest of
    these, nor below the mean. O(L E log E).
    """
    loads = -np.sort(-np.asarray(load, np.float64), axis=1)
    num_layers, num_experts = loads.shape
    capacity = -(-num_experts // num_ranks)
    fewest = max(0, num_experts - (num_ranks - 1) * capacity)
    hottest_first = np.concatenate([np.zeros((num_layers, 1)), loads.cumsum(axis=1)], axis=1)
    coolest_first = np.concatenate(
        [np.zeros((num_layers, 1)), loads[:, ::-1].cumsum(axis=1)], axis=1
    )
    mean = hottest_first[:, -1] / num_ranks
    bound = mean
    for j in range((num_experts - 1) // num_ranks + 1):
        together = hottest_first[:, j * num_ranks + 1] - hottest_first[:, j * (num_ranks - 1)]
        joining = coolest_first[:, max(0, fewest - j - 1)]
        bound = np.maximum(bound, together + joining)
    with np.errstate(invalid="ignore"):
        ratio: NDArray[np.float64] = bound / mean
    return ratio

"""Which experts of a layer fire together, and how few pairs make up most of it.

Shape letters: L layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.affinity.information import entropy
from placer.affinity.model import Affinity


@dataclass(frozen=True, eq=False)
class Concentration:
    """How the co-activations of a layer spread over its E (E-1) / 2 pairs; nan without any.

    Attributes:
        effective_pairs: [L] 2 ** entropy of the pairs: equally frequent pairs that would be as
            hard to guess.
        effective_share: [L] the same, as a share of all pairs.
        half_share: [L] share of all pairs that carry half of all co-activations.
        half_share_by_load: [L] the same share if experts fired together only as often as their
            loads say. half_share below it is what load does not explain.
    """

    effective_pairs: NDArray[np.float64]
    effective_share: NDArray[np.float64]
    half_share: NDArray[np.float64]
    half_share_by_load: NDArray[np.float64]


def lift(affinity: Affinity) -> NDArray[np.float64]:
    """[L, E, E] how much more often two experts fire together than independent ones would.

    tokens * coactivation(e, f) / (load(e) load(f)); the diagonal and pairs with an unused expert
    are nan. A router that picks K of E at random shows (K-1) E / (K (E-1)), a little less than 1.
    """
    load = affinity.load.astype(np.float64)
    expected = load[:, :, None] * load[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = affinity.coactivation * affinity.tokens[:, None, None] / expected
    diagonal = np.arange(affinity.num_experts)
    ratio[:, diagonal, diagonal] = np.nan
    ratio[expected == 0] = np.nan
    return ratio


def concentration(affinity: Affinity) -> Concentration:
    """Concentration of the co-activations of every layer. O(L E^2 log E)."""
    first, second = np.triu_indices(affinity.num_experts, 1)
    pairs = affinity.coactivation[:, first, second].astype(np.float64)
    load = affinity.load.astype(np.float64)
    total = pairs.sum(axis=1, keepdims=True)
    probability = np.divide(pairs, total, out=np.full(pairs.shape, np.nan), where=total > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(total[:, 0] > 0, 2 ** entropy(probability), np.nan)
        return Concentration(
            effective_pairs=effective,
            effective_share=effective / len(first),
            half_share=_share_that_carries_half(pairs),
            half_share_by_load=_share_that_carries_half(load[:, first] * load[:, second]),
        )


def _share_that_carries_half(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] smallest share of the columns of [L, P] whose sum is at least half; nan for zeros."""
    running = (-np.sort(-weight, axis=1)).cumsum(axis=1)
    if running.shape[1] == 0:
        return np.full(len(running), np.nan)
    needed = (running < running[:, -1:] / 2).sum(axis=1) + 1
    return np.where(running[:, -1] > 0, needed / running.shape[1], np.nan)

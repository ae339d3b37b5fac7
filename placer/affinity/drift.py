"""How much the load differs between parts of a trace: phases, workloads, halves of the requests.

A plan that is fitted to one part and serves another pays for this distance.

Shape letters: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Drift:
    """Distance of two loads, per layer; nan where one of them is empty.

    Attributes:
        total_variation: [L] half the sum of |share - other share|: the part of the load that
            would have to move to turn one into the other, 0 to 1.
        chance: [L] about what total variation would be if both were drawn from the same tokens
            independently; tokens of one request are alike, so the real floor is higher.
        cosine: [L] 1 - cosine of the angle between the loads, 0 to 1.
    """

    total_variation: Array
    chance: Array
    cosine: Array


def load_drift(
    load: NDArray[np.int64],
    other: NDArray[np.int64],
    tokens: NDArray[np.int64],
    other_tokens: NDArray[np.int64],
) -> Drift:
    """Drift between loads [L, E].

    Args:
        load, other: [L, E] token-expert pairs.
        tokens, other_tokens: [L] tokens that used experts of the layer.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        first = load / load.sum(axis=1, keepdims=True)
        second = other / other.sum(axis=1, keepdims=True)
        product = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosine = np.maximum(1 - (first * second).sum(axis=1) / product, 0.0)
        # an expert of probability P per token: variance P (1 - P) / (tokens k^2) of its share
        chosen = (load + other) / (tokens + other_tokens)[:, None]
        k = chosen.sum(axis=1, keepdims=True)
        variance = np.clip(chosen * (1 - chosen), 0, None) / k**2
        variance = variance * (1 / tokens + 1 / other_tokens)[:, None]
        chance = np.sqrt(2 / np.pi * variance).sum(axis=1) / 2
    return Drift(np.abs(first - second).sum(axis=1) / 2, chance, cosine)

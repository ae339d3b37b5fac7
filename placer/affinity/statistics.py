"""The figures of `placer analyze`: everything that one `Affinity` says, ready for JSON.

docs/analysis.md gives every formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.coactivation import concentration
from placer.affinity.headroom import headroom
from placer.affinity.information import all_pairs_information, primary_information
from placer.affinity.model import Affinity
from placer.affinity.skew import load_skew

USUAL_RANKS = (2, 4, 8, 16, 32, 64, 128)


def summary(affinity: Affinity, num_ranks: Sequence[int] | None = None) -> dict[str, Any]:
    """What the counts say, as a JSON document; every figure per layer and as the mean of layers.

    Args:
        affinity: the counts.
        num_ranks: for how many ranks to give the headroom; by default the powers of two below
            the number of experts that divide it.
    """
    if num_ranks is None:
        num_ranks = [
            g for g in USUAL_RANKS if g < affinity.num_experts and affinity.num_experts % g == 0
        ]
    return {
        "num_tokens": affinity.num_tokens,
        "num_layers": affinity.num_layers,
        "num_experts": affinity.num_experts,
        "top_k": affinity.top_k,
        "layer_ids": affinity.layer_ids.tolist(),
        "experts_per_token": per_layer(_experts_per_token(affinity)),
        "load": figures(load_skew(affinity.load)),
        "coactivation": figures(concentration(affinity)),
        "affinity": {
            "all_pairs": figures(all_pairs_information(affinity)),
            "primary": figures(primary_information(affinity)),
        },
        "headroom": [
            {"num_ranks": g, **figures(headroom(affinity, g), leave_out="num_ranks")}
            for g in num_ranks
        ],
    }


def figures(statistics: object, leave_out: str = "") -> dict[str, Any]:
    """The arrays of a dataclass of per-layer figures, as JSON values."""
    return {name: per_layer(v) for name, v in vars(statistics).items() if name != leave_out}


def per_layer(values: NDArray[np.number]) -> dict[str, Any]:
    """A figure per layer as a JSON value; nan becomes null and does not enter the mean."""
    known = values[np.isfinite(values)]
    return {
        "mean": float(known.mean()) if known.size else None,
        "per_layer": [None if not np.isfinite(value) else value for value in values.tolist()],
    }


def _experts_per_token(affinity: Affinity) -> NDArray[np.float64]:
    """[L] mean number of experts of the tokens that use any."""
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = affinity.load.sum(axis=1) / affinity.tokens
    return mean

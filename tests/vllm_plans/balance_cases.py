"""Loads of forward passes, and placer's figures of the same passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cost import measure, replay
from placer.placement import contiguous
from placer.trace import make_trace

NUM_RANKS, NUM_EXPERTS, NUM_LAYERS, NUM_PASSES = 4, 16, 3, 7


def passes(seed: int) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """placer's figures of a skewed trace, and its rank loads [passes, layers, ranks]."""
    rng = np.random.default_rng(seed)
    step = np.sort(rng.integers(0, NUM_PASSES, 300))
    popularity = rng.gumbel(size=(300, NUM_LAYERS, NUM_EXPERTS)) - np.arange(NUM_EXPERTS) / 6
    experts = np.argsort(-popularity, axis=2)[:, :, :2]
    trace = make_trace(
        experts=experts,
        num_experts=NUM_EXPERTS,
        request=np.arange(300) % 5,
        position=np.arange(300) // 5,
        step=step,
    )
    loads = np.zeros((NUM_PASSES, NUM_LAYERS, NUM_RANKS), np.int64)
    rank = experts // (NUM_EXPERTS // NUM_RANKS)
    for layer in range(NUM_LAYERS):
        np.add.at(loads, (step[:, None], layer, rank[:, layer]), 1)
    placement = contiguous(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_EXPERTS // NUM_RANKS, NUM_RANKS)
    figures = measure(replay(trace, placement), num_resamples=0).to_dict()
    return figures, loads

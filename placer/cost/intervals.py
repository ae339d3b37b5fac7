"""Confidence intervals over requests: bootstrap, and a group jackknife for batches.

Requests are what is drawn again, never tokens: the tokens of one request are alike. Sums per
request make a resample a row of counts, so B resamples are one matrix product.

References: Davison & Hinkley, Bootstrap Methods and their Application (1997), section 5.2 (basic
and percentile intervals); Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_CHUNK_BYTES = 2**26


def resample_counts(num_blocks: int, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """[B, R] how often each request block is drawn in each resample; rows sum to R."""
    generator = np.random.default_rng(seed)
    share = np.full(num_blocks, 1 / num_blocks)
    return generator.multinomial(num_blocks, share, size=num_resamples).astype(np.float64)


def percentile(resampled: NDArray[np.float64], confidence: float) -> Interval | None:
    """The central interval of resampled values [B]; None when some are undefined."""
    if not np.isfinite(resampled).all():
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def basic(value: float, resampled: NDArray[np.float64], confidence: float) -> Interval | None:
    """[2 value - high, 2 value - low] of the percentile interval, widened to hold `value`.

    For figures made of a maximum. A sample's busiest rank is busier than it would be over many
    requests, and a resample's busier still, so the percentile interval lies on the wrong side.
    """
    central = percentile(resampled, confidence)
    if central is None:
        return None
    low, high = 2 * value - central[1], 2 * value - central[0]
    return min(low, value), max(high, value)


def basic_of_inverse(
    value: float, resampled: NDArray[np.float64], confidence: float
) -> Interval | None:
    """The basic interval of 1 / value, turned back: for a mean over a maximum."""
    found = basic(1 / value, 1 / resampled, confidence) if (resampled > 0).all() else None
    if found is None or found[0] <= 0:
        return None
    return 1 / found[1], 1 / found[0]


def resampled_loads(
    counts: NDArray[np.float64],
    loads: NDArray[np.int64],
    reduce: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """[B, M] figures of every resample's rank loads, in bounded memory.

    Args:
        counts: [B, R] from `resample_counts`.
        loads: [R, L, G] pairs served.
        reduce: rank loads [b, L, G] -> figures [b, M].

    Cost: O(B R L G), as matrix products.
    """
    num_blocks, num_layers, num_ranks = loads.shape
    flat = loads.reshape(num_blocks, -1).astype(np.float64)
    step = max(1, _CHUNK_BYTES // (8 * max(1, flat.shape[1])))
    parts = [
        reduce((counts[start : start + step] @ flat).reshape(-1, num_layers, num_ranks))
        for start in range(0, counts.shape[0], step)
    ]
    return np.concatenate(parts)


def jackknife(
    value: float, without_group: NDArray[np.float64], confidence: float
) -> Interval | None:
    """Interval from the values with each of J groups of requests left out.

    value -+ t(J-1) * sqrt((J-1)/J * sum over groups of (value_j - their mean)^2).
    None when a value is undefined or there is one group.
    """
    num_groups = without_group.size
    if num_groups < 2 or not (np.isfinite(value) and np.isfinite(without_group).all()):
        return None
    spread = float(((without_group - without_group.mean()) ** 2).sum())
    error = float(np.sqrt((num_groups - 1) / num_groups * spread))
    half = student_t((1 + confidence) / 2, num_groups - 1) * error
    return value - half, value + half


def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution (scipy is imported only when this is called)."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))

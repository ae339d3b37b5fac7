"""Intervals over requests: the delete-a-group jackknife.

Reference: Kott, The Delete-a-Group Jackknife, Journal of Official Statistics 17 (2001). With J
groups of requests, se^2 = (J-1)/J * sum over groups of (value without the group - their mean)^2,
and value -+ t(J-1) * se.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def estimate(value: float, without: ArrayLike, confidence: float = 0.95) -> dict[str, Any]:
    """{value, low, high} as JSON values; low and high are None where there is no interval.

    Args:
        value: from all requests.
        without: [J] the same with each group of requests left out in turn.
        confidence: of the interval.
    """
    left: NDArray[np.float64] = np.asarray(without, np.float64)
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if left.size < 2 or not np.isfinite(left).all():
        return {"value": float(value), "low": None, "high": None}
    from scipy.special import stdtrit

    spread = float(((left - left.mean()) ** 2).sum()) * (left.size - 1) / left.size
    half = float(stdtrit(left.size - 1, (1 + confidence) / 2)) * spread**0.5
    return {"value": float(value), "low": float(value - half), "high": float(value + half)}

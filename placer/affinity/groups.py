"""Groups of tokens that are counted apart: by phase, by workload label, by request.

A key takes a chunk [T tokens] and gives the names of its groups and, per token, which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from placer.trace.model import PHASE_NAMES, Trace

GroupKey = Callable[[Trace], tuple[Sequence[str], NDArray[np.integer]]]

FOLD_NAMES = ("fold 0", "fold 1")


def phase_of(trace: Trace) -> tuple[Sequence[str], NDArray[np.integer]]:
    """Groups "prefill" and "decode"."""
    return PHASE_NAMES, trace.phase


def label_of(trace: Trace) -> tuple[Sequence[str], NDArray[np.integer]]:
    """A group per workload label; "" for requests without one."""
    requests, inverse = np.unique(trace.request, return_inverse=True)
    labels = [trace.labels.get(request, "") for request in requests.tolist()]
    names, index = np.unique(np.array(labels, np.str_), return_inverse=True)
    return names.tolist(), index[inverse]


def fold_of(trace: Trace) -> tuple[Sequence[str], NDArray[np.integer]]:
    """Two halves of the requests, by a hash of the request id (the finaliser of SplitMix64)."""
    x = trace.request.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return FOLD_NAMES, (x & np.uint64(1)).astype(np.int64)


def both_of(first: GroupKey, second: GroupKey) -> GroupKey:
    """Groups of tokens that agree in both keys, named "first/second"."""

    def key(trace: Trace) -> tuple[Sequence[str], NDArray[np.integer]]:
        names, index = first(trace)
        more, other = second(trace)
        joined = [f"{name}/{other_name}" for name in names for other_name in more]
        return joined, index.astype(np.int64) * len(more) + other

    return key

"""A trace as the compiled kernels read it: blocks of checked expert ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from placer.trace.model import Trace

MOST_EXPERTS = 2**16 - 2
"""Ids are counted as uint16, where the largest value says "unused"."""

_BLOCK_TOKENS = 1 << 16


def blocks(trace: Trace) -> Iterator[tuple[slice, NDArray[np.uint16]]]:
    """Blocks of at most 65536 tokens in order: which tokens, and their ids [T, L, K].

    Unused ids become 65535. int16 ids of a contiguous trace are not copied.

    Raises:
        ValueError: an id is no expert; the kernels rely on it that all are.
    """
    for start in range(0, trace.num_tokens, _BLOCK_TOKENS):
        block = slice(start, min(start + _BLOCK_TOKENS, trace.num_tokens))
        experts = trace.experts[block]
        low, high = int(experts.min(initial=0)), int(experts.max(initial=0))
        if low < -1 or high >= trace.num_experts:
            raise ValueError(
                f"expert ids lie in {low}..{high}, expected -1..{trace.num_experts - 1}"
            )
        ids = np.ascontiguousarray(experts.astype(np.int16, copy=False)).view(np.uint16)
        yield block, ids

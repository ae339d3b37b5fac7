"""Orders of a trace's tokens: as recorded, or mixed from all requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.trace.model import Trace


def concatenate(chunks: list[Trace]) -> Trace:
    """One trace with the tokens of all chunks, in their order."""
    if len(chunks) == 1:
        return chunks[0]

    def joined(name: str) -> Any:
        parts = [getattr(chunk, name) for chunk in chunks]
        return None if parts[0] is None else np.concatenate(parts)

    names = ("experts", "request", "position", "phase", "step", "weights", "home")
    return replace(chunks[0], **{name: joined(name) for name in names})


def interleave(trace: Trace) -> Trace:
    """The tokens taken round-robin over requests, without forward passes.

    First the first token of every request, requests in the order of their first appearance, then
    the second of every request that has one, and so on.
    """
    _, first, inverse = np.unique(trace.request, return_index=True, return_inverse=True)
    appearance = first[inverse.reshape(-1)]
    by_request = np.argsort(appearance, kind="stable")
    grouped = appearance[by_request]
    is_start = np.ones(grouped.size, np.bool_)
    is_start[1:] = grouped[1:] != grouped[:-1]
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=grouped.size)
    turn = np.empty(grouped.size, np.int64)
    turn[by_request] = np.arange(grouped.size) - np.repeat(starts, lengths)
    order: NDArray[Any] = np.lexsort((appearance, turn))
    return replace(trace.select(order), step=None)

"""Compiled walks over the tokens of requests, layer by layer. Imported only when needed.

Shape letters: T tokens, L layers, K experts per token, E experts, R requests, J groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.compiling import compiled

Ids = NDArray[np.int32]
Counts = NDArray[np.int64]


def _window_histogram(
    experts: Ids, layer: int, starts: Counts, group: Counts, length: int, counts: Any, hist: Counts
) -> None:
    """Add, of every window of `length` tokens inside a request, each expert's uses. O(T (K + m)).

    Args:
        experts: [T, L, K], -1 = unused.
        layer: which layer.
        starts: [R + 1] where requests begin.
        group: [R] group of each request.
        length: m, tokens of a window.
        counts: [E] scratch.
        hist: [J, m + 1] experts by how many of the window's tokens use them, added to.
    """
    top_k = experts.shape[2]
    inside = np.zeros(length + 1, np.int64)
    for r in range(starts.size - 1):
        first, last = starts[r], starts[r + 1]
        if last - first < length:
            continue
        counts[:] = 0
        inside[:] = 0
        inside[0] = counts.size
        row = group[r]
        for t in range(first, last):
            if t - first >= length:
                for k in range(top_k):
                    e = experts[t - length, layer, k]
                    if e >= 0:
                        inside[counts[e]] -= 1
                        counts[e] -= 1
                        inside[counts[e]] += 1
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= 0:
                    inside[counts[e]] -= 1
                    counts[e] += 1
                    inside[counts[e]] += 1
            if t - first >= length - 1:
                for c in range(length + 1):
                    hist[row, c] += inside[c]


window_histogram = compiled(_window_histogram)


def _cache_hits(
    experts: Ids,
    layer: int,
    starts: Counts,
    group: Counts,
    size: int,
    horizon: int,
    num_experts: int,
    hits: Counts,
    uses: Counts,
) -> None:
    """Run a cache of `size` experts over every request, starting empty. O(T K E).

    Hits are what is cached before a token. Its experts are then served one after the other, each
    of them in the cache while it is served. A load into a full cache evicts the other expert with
    the fewest uses in the rest of the token and the `horizon` - 1 next ones (of equal ones the
    least recently served). Loads into free room count as hits.

    Args:
        experts, layer, starts, group: as in `window_histogram`.
        size: C, experts that the cache holds.
        horizon: m; 0 = evict the least recently served one.
        num_experts: E.
        hits, uses: [J] added to.
    """
    top_k = experts.shape[2]
    cached = np.zeros(num_experts, np.bool_)
    future = np.zeros(num_experts, np.int64)
    served_at = np.zeros(num_experts, np.int64)
    for r in range(starts.size - 1):
        first, last = starts[r], starts[r + 1]
        cached[:] = False
        future[:] = 0
        filled = 0
        clock = 0
        for t in range(first, min(first + horizon, last)):
            for k in range(top_k):
                if experts[t, layer, k] >= 0:
                    future[experts[t, layer, k]] += 1
        for t in range(first, last):
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= 0:
                    uses[group[r]] += 1
                    hits[group[r]] += cached[e]
            for k in range(top_k):
                e = experts[t, layer, k]
                if e < 0:
                    continue
                clock += 1
                served_at[e] = clock
                if horizon:
                    future[e] -= 1
                if cached[e]:
                    continue
                if filled < size:
                    filled += 1
                    hits[group[r]] += 1
                else:
                    victim = -1
                    for v in range(num_experts):
                        if cached[v] and (
                            victim < 0
                            or future[v] < future[victim]
                            or (future[v] == future[victim] and served_at[v] < served_at[victim])
                        ):
                            victim = v
                    cached[victim] = False
                cached[e] = True
            if horizon and t + horizon < last:
                for k in range(top_k):
                    if experts[t + horizon, layer, k] >= 0:
                        future[experts[t + horizon, layer, k]] += 1


cache_hits = compiled(_cache_hits)


def _distinct(
    experts: Ids, order: Counts, batch_tokens: int, stamps: Counts, found: Counts
) -> None:
    """Count the distinct experts of batches: `batch_tokens` tokens each, in this order. O(T L K).

    Args:
        experts: [T, L, K], -1 = unused.
        order: [t] tokens, batch by batch; an incomplete last batch is left out.
        batch_tokens: B.
        stamps: [L, E] scratch, zeros.
        found: [L] sum over the batches, added to.
    """
    num_layers, top_k = experts.shape[1], experts.shape[2]
    for i in range(order.size // batch_tokens * batch_tokens):
        stamp = i // batch_tokens + 1
        t = order[i]
        for layer in range(num_layers):
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= 0 and stamps[layer, e] != stamp:
                    stamps[layer, e] = stamp
                    found[layer] += 1


distinct = compiled(_distinct)

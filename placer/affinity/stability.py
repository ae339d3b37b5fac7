"""How the load moves over time, beside what chance among requests moves it.

Shape letters: L layers, E experts, W windows of requests, J groups of requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.drift import load_drift
from placer.affinity.jackknife import estimate
from placer.affinity.loads import part_loads
from placer.affinity.sample import NUM_GROUPS, request_sizes
from placer.trace.source import TraceSource
from placer.trace.split import scramble

NUM_WINDOWS = 8


def load_stability(source: TraceSource) -> dict[str, Any] | None:
    """Total variation of the load between windows of requests, by how far apart they are.

    The requests in the order of their ids are cut into 8 windows of about equally many tokens. The
    floor is the same between 8 windows of requests drawn at random: what differs between them is
    chance, that of whole requests and not of tokens.

    Returns:
        None with fewer than 16 requests or no load; else `windows`, `by_lag`: of each lag its
        `total_variation` with interval (mean over pairs of windows and over layers), `floor`, and
        `request_effect`: floor / what it would be if tokens were drawn one by one.
    """
    ids, sizes = request_sizes(source)
    if ids.size < 2 * NUM_WINDOWS:
        return None
    middle = np.cumsum(sizes) - sizes / 2
    window_of = np.minimum(middle * NUM_WINDOWS / sizes.sum(), NUM_WINDOWS - 1).astype(np.int64)
    shuffled = np.argsort(scramble(ids, seed=2))
    random_of = np.empty_like(window_of)
    random_of[shuffled] = np.minimum(
        (np.cumsum(sizes[shuffled]) - sizes[shuffled] / 2) * NUM_WINDOWS / sizes.sum(),
        NUM_WINDOWS - 1,
    ).astype(np.int64)
    rank = np.empty(ids.size, np.int64)
    rank[np.argsort(scramble(ids, seed=1))] = np.arange(ids.size)
    group_of = rank % NUM_GROUPS

    num_parts = NUM_WINDOWS * NUM_GROUPS
    timed = np.zeros((NUM_WINDOWS, NUM_GROUPS, source.num_layers, source.num_experts), np.int64)
    drawn = np.zeros((NUM_WINDOWS, source.num_layers, source.num_experts), np.int64)
    tokens = np.zeros((NUM_WINDOWS, source.num_layers), np.int64)
    for chunk in source.chunks(with_weights=False):
        at = np.searchsorted(ids, chunk.request)
        for part, load in enumerate(
            part_loads(chunk, window_of[at] * NUM_GROUPS + group_of[at], num_parts)
        ):
            timed[divmod(part, NUM_GROUPS)] += load.load
        for part, load in enumerate(part_loads(chunk, random_of[at], NUM_WINDOWS)):
            drawn[part] += load.load
            tokens[part] += load.tokens

    windows = timed.sum(axis=1)
    if not windows.any():
        return None
    by_lag = []
    for lag in range(1, NUM_WINDOWS):
        without = [_at_lag(windows - timed[:, group], lag) for group in range(NUM_GROUPS)]
        by_lag.append({"lag": lag, "total_variation": estimate(_at_lag(windows, lag), without)})
    pairs = [(a, b) for a in range(NUM_WINDOWS) for b in range(a + 1, NUM_WINDOWS)]
    drifts = [load_drift(drawn[a], drawn[b], tokens[a], tokens[b]) for a, b in pairs]
    floor = float(np.mean([_mean(drift.total_variation) for drift in drifts]))
    by_tokens = float(np.mean([_mean(drift.chance) for drift in drifts]))
    return {
        "windows": NUM_WINDOWS,
        "by_lag": by_lag,
        "floor": floor,
        "request_effect": floor / by_tokens if by_tokens > 0 else None,
    }


def _at_lag(loads: NDArray[np.int64], lag: int) -> float:
    """Mean total variation of loads [W, L, E] that lie `lag` windows apart."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = loads / loads.sum(axis=2, keepdims=True)
    return _mean(np.abs(share[lag:] - share[:-lag]).sum(axis=2) / 2)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")

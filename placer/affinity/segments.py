"""Routing within segments of a request: can a fixed or a cached set of experts serve it?

What matters where experts are cached or offloaded. The measures are those of Liang et al., "Not
All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models"
(arXiv 2505.16056, 2025): segment routing best performance (SRP) and segment cache best hit rate
(SCH). Their program (moe-lrc) uses windows at every position, as here.

Shape letters: T tokens, L layers, E experts, J groups of requests, m tokens of a segment.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.jackknife import estimate
from placer.affinity.sample import NUM_GROUPS, Sample

SEGMENT_TOKENS = (4, 16, 64)
CACHE_HORIZON = 16
CACHE_SIZES = (1, 2, 4)
"""Cache sizes, in units of the experts that a token uses."""


def segment_routing(sample: Sample) -> list[dict[str, Any]]:
    """SRP for each length of a segment that some request reaches.

    In a window of m tokens an expert is predicted for all of them when at least c of them use it.
    matches = its uses in such windows, predictions = m * such (window, expert) pairs, uses = all.
    SRP = max over c of F1 = 2 matches / (predictions + uses), pooled over layers and windows.

    Returns:
        of each length: `segment_tokens`, `srp` with interval, `srp_by_chance` (tokens of the
        sample in random order across requests), `threshold` c, and `experts_kept` = predictions /
        uses at it: the size of the fixed set, in units of the experts that tokens use.
    """
    shuffled = np.random.default_rng(0).permutation(sample.trace.num_tokens)
    found = []
    for length in SEGMENT_TOKENS:
        hist = _histograms(sample, sample.experts, length)
        if not hist[:, 1:].any():
            continue
        chance = _histograms(sample, sample.experts[shuffled], length).sum(axis=0)
        whole = hist.sum(axis=0)
        srp, threshold, kept = best_f1(whole)
        without = [best_f1(whole - part)[0] for part in hist if part.any()]
        found.append(
            {
                "segment_tokens": length,
                "srp": estimate(srp, without),
                "srp_by_chance": best_f1(chance)[0],
                "threshold": threshold,
                "experts_kept": kept,
            }
        )
    return found


def best_f1(histogram: NDArray[np.int64]) -> tuple[float, int, float]:
    """(SRP, its threshold c, predictions / uses) of (window, expert) pairs by uses [m + 1]."""
    length = histogram.size - 1
    uses_by_count = histogram * np.arange(length + 1)
    matches = uses_by_count[::-1].cumsum()[::-1]
    predictions = length * histogram[::-1].cumsum()[::-1]
    uses = int(uses_by_count.sum())
    if uses == 0:
        return float("nan"), 0, float("nan")
    f1 = 2 * matches / (predictions + uses)
    best = int(f1.argmax())
    return float(f1[best]), best, float(predictions[best] / uses)


def _histograms(sample: Sample, experts: NDArray[np.int32], length: int) -> NDArray[np.int64]:
    """[J, m + 1] (window, expert) pairs by how many tokens use the expert, over all layers."""
    from placer.affinity.sequence_kernels import window_histogram

    hist = np.zeros((NUM_GROUPS, length + 1), np.int64)
    counts = np.zeros(sample.trace.num_experts, np.int64)
    for layer in range(sample.trace.num_layers):
        window_histogram(
            experts, layer, sample.starts, sample.group_of_request, length, counts, hist
        )
    return hist


def segment_caching(sample: Sample) -> list[dict[str, Any]]:
    """SCH and, beside it, what a cache without foresight reaches, by cache size.

    A cache holds C experts of each layer and starts every request empty. SCH evicts the expert with
    the fewest uses in the next 16 tokens; LRU the least recently used one.

    Returns:
        of each size: `cache_experts` C, `experts_per_token` C / (mean experts of a token), and
        `sch`, `lru` with intervals: hits / uses, pooled over layers and requests.
    """
    from placer.affinity.sequence_kernels import cache_hits

    num_experts = sample.trace.num_experts
    used = (sample.experts >= 0).sum(axis=2)
    per_token = float(used[used > 0].mean()) if used.any() else float("nan")
    if not np.isfinite(per_token):
        return []
    found: list[dict[str, Any]] = []
    for multiple in CACHE_SIZES:
        size = round(multiple * per_token)
        if size >= num_experts or any(size == entry["cache_experts"] for entry in found):
            continue
        entry: dict[str, Any] = {"cache_experts": size, "experts_per_token": size / per_token}
        for name, horizon in (("sch", CACHE_HORIZON), ("lru", 0)):
            hits, uses = np.zeros(NUM_GROUPS, np.int64), np.zeros(NUM_GROUPS, np.int64)
            for layer in range(sample.trace.num_layers):
                cache_hits(
                    sample.experts, layer, sample.starts, sample.group_of_request,
                    size, horizon, num_experts, hits, uses,
                )  # fmt: skip
            entry[name] = _ratio(hits, uses)
        found.append(entry)
    return found


def _ratio(above: NDArray[np.int64], below: NDArray[np.int64]) -> dict[str, Any]:
    """Sum of `above` / sum of `below` [J], with its interval."""
    rest = below.sum() - below
    usable = (below > 0) & (rest > 0)
    without = (above.sum() - above)[usable] / rest[usable]
    return estimate(float(above.sum() / below.sum()), without)

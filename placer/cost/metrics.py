"""The figures of a replay: names, units, values, intervals over requests, paired comparison."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from placer.cost.batches import BatchFigures
from placer.cost.definitions import METRICS
from placer.cost.intervals import (
    Interval,
    basic,
    basic_of_inverse,
    jackknife,
    percentile,
    resample_counts,
    resampled_loads,
)
from placer.cost.replay import SUMS, Replay
from placer.errors import UsageError

# name -> the two columns of the sums whose ratio it is
_RATIOS = {
    "span": ("span", "token_layers"),
    "messages_alltoall": ("messages_alltoall", "token_layers"),
    "messages_coherent": ("messages_coherent", "token_layers"),
    "node_span": ("node_span", "token_layers"),
    "node_messages_alltoall": ("node_messages_alltoall", "token_layers"),
    "node_messages_coherent": ("node_messages_coherent", "token_layers"),
    "cross_rank_fraction": ("cross_rank_pairs", "pairs"),
    "cross_rank_fraction_per_token": ("cross_rank_per_token", "transitions"),
    "cross_node_fraction": ("cross_node_pairs", "pairs"),
    "cross_node_fraction_per_token": ("cross_node_per_token", "transitions"),
}


@dataclass(frozen=True)
class Metrics:
    """Every figure of METRICS for one replay.

    Attributes:
        values: name -> value; None where the trace does not define it.
        intervals: name -> interval over requests; None where there is none (one request, or a
            figure that some resample leaves undefined).
        confidence: of the intervals.
        num_resamples, seed: of the bootstrap.
        notes: name -> how the figure's batches were made.
    """

    values: dict[str, float | None]
    intervals: dict[str, Interval | None]
    confidence: float
    num_resamples: int
    seed: int
    notes: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: name -> value, low, high, unit and, for batch figures, how batches were made."""
        document: dict[str, Any] = {}
        for info in METRICS:
            if info.name not in self.values:
                continue
            low, high = self.intervals[info.name] or (None, None)
            entry = {"value": self.values[info.name], "low": low, "high": high, "unit": info.unit}
            if info.name in self.notes:
                entry["batches"] = self.notes[info.name]
            document[info.name] = entry
        return document


@dataclass(frozen=True)
class _Draws:
    """A figure and what becomes of it in resamples, or without each group of requests."""

    value: float
    drawn: NDArray[np.float64]
    by: Literal["percentile", "basic", "basic_of_inverse", "jackknife"]

    def interval(
        self, confidence: float, bounds: tuple[float, float] = (-inf, inf)
    ) -> Interval | None:
        if self.drawn.size == 0:
            return None
        if self.by == "percentile":
            found = percentile(self.drawn, confidence)
        elif self.by == "basic":
            found = basic(self.value, self.drawn, confidence)
        elif self.by == "basic_of_inverse":
            found = basic_of_inverse(self.value, self.drawn, confidence)
        else:
            found = jackknife(self.value, self.drawn, confidence)
        if found is None:
            return None
        return max(found[0], bounds[0]), min(found[1], bounds[1])


def measure(
    replay: Replay, *, num_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Metrics:
    """All figures of a replay, with intervals over requests.

    Means and shares: percentile bootstrap over requests. Imbalance and balancedness (through its
    inverse): basic bootstrap from the same resamples. Figures over batches: group jackknife over
    requests, because a resample would have to form batches anew. docs/metrics.md says why.

    Args:
        replay: from `placer.cost.replay.replay`.
        num_resamples: B; 0 for no intervals.
        seed: of the resamples.
        confidence: of the intervals.

    Cost: O(B R L G) for R requests, as matrix products.
    """
    draws = _draw(replay, num_resamples, seed)
    bounds = {info.name: info.bounds for info in METRICS}
    return Metrics(
        values={name: _finite(draw.value) for name, draw in draws.items()},
        intervals={name: draw.interval(confidence, bounds[name]) for name, draw in draws.items()},
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
        notes=_notes(replay),
    )


def compare(
    plan: Replay,
    baseline: Replay,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, dict[str, float | None]]:
    """Relative change of every figure from a baseline, on the same tokens and resamples.

    Args:
        plan, baseline: replays of the same trace.
        num_resamples, seed, confidence: as in `measure`.

    Returns:
        name -> {value, baseline, change, change_low, change_high}, where change is
        value / baseline - 1; None where it is undefined. An interval that leaves out 0 says that
        the difference is more than chance among requests.

    Raises:
        UsageError: the replays are of different tokens or batches.
    """
    column = SUMS.index("token_layers")
    if not np.array_equal(plan.sums[:, column], baseline.sums[:, column]):
        raise UsageError("the two replays are not of the same tokens; a paired comparison needs it")
    if plan.batches.how != baseline.batches.how:
        raise UsageError(
            f"one replay has batches of {plan.batches.how}, the other of {baseline.batches.how}"
        )
    ours = _draw(plan, num_resamples, seed)
    theirs = _draw(baseline, num_resamples, seed)
    compared: dict[str, dict[str, float | None]] = {}
    for name in ours:
        if name not in theirs:
            continue
        new, old = ours[name], theirs[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = _Draws(float(np.divide(new.value, old.value)), new.drawn / old.drawn, new.by)
        interval = ratio.interval(confidence) if np.isfinite(ratio.value) else None
        low, high = interval or (None, None)
        compared[name] = {
            "value": _finite(new.value),
            "baseline": _finite(old.value),
            "change": _finite(ratio.value - 1),
            "change_low": None if low is None else low - 1,
            "change_high": None if high is None else high - 1,
        }
    return compared


def imbalance_of(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] mean over layers with load of max / mean rank load, of loads [..., L, G]."""
    mean = loads.mean(axis=-1)
    loaded = mean > 0
    ratio = np.divide(loads.max(axis=-1), mean, out=np.zeros_like(mean), where=loaded)
    return _divide(ratio.sum(axis=-1), loaded.sum(axis=-1))


def balancedness_of(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] sum over layers of mean rank load / sum of max rank load, of loads [..., L, G].

    vLLM's definition, which it applies to each forward pass; here it is of the whole trace.
    """
    return _divide(loads.mean(axis=-1).sum(axis=-1), loads.max(axis=-1).sum(axis=-1))


def _draw(replay: Replay, num_resamples: int, seed: int) -> dict[str, _Draws]:
    resampled = num_resamples if replay.num_requests > 1 else 0
    counts = resample_counts(max(1, replay.sums.shape[0]), resampled, seed)
    counts = counts[:, : replay.sums.shape[0]]
    totals = replay.sums.sum(axis=0)
    drawn_totals = counts @ replay.sums
    draws: dict[str, _Draws] = {}
    for name, (numerator, denominator) in _RATIOS.items():
        above, below = SUMS.index(numerator), SUMS.index(denominator)
        draws[name] = _Draws(
            float(_divide(totals[above], totals[below])),
            _divide(drawn_totals[:, above], drawn_totals[:, below]),
            "percentile",
        )

    def of_loads(loads: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([imbalance_of(loads), balancedness_of(loads)], axis=-1)

    whole = of_loads(replay.rank_load.astype(np.float64))
    drawn = resampled_loads(counts, replay.loads, of_loads) if resampled else np.zeros((0, 2))
    draws["imbalance"] = _Draws(float(whole[0]), drawn[:, 0], "basic")
    draws["balancedness"] = _Draws(float(whole[1]), drawn[:, 1], "basic_of_inverse")
    with_groups = resampled > 0
    draws |= _batch_draws(replay.batches, "imbalance_batches", with_groups)
    if replay.mixed_batches is not None:
        draws |= _batch_draws(replay.mixed_batches, "imbalance_mixed_batches", with_groups)
    draws |= _engine_draws(replay.batches, with_groups)
    return {info.name: draws[info.name] for info in METRICS if info.name in draws}


def _batch_draws(batches: BatchFigures, prefix: str, with_groups: bool) -> dict[str, _Draws]:
    rows = [row[np.isfinite(row)] for row in _rows(batches, batches.imbalance, with_groups)]
    mean = np.array([row.mean() if row.size else np.nan for row in rows])
    p95 = np.array([np.quantile(row, 0.95) if row.size else np.nan for row in rows])
    return {
        f"{prefix}_mean": _Draws(float(mean[0]), mean[1:], "jackknife"),
        f"{prefix}_p95": _Draws(float(p95[0]), p95[1:], "jackknife"),
    }


def _engine_draws(batches: BatchFigures, with_groups: bool) -> dict[str, _Draws]:
    """Balance as vLLM, SGLang and TensorRT-LLM define it.

    vLLM: per forward pass, the sum over layers of mean rank load / the sum of max rank load; then
    the mean over passes (vllm/distributed/eplb/eplb_state.py, `_compute_eplb_load_stats`).

    SGLang: per forward pass, the mean over layers of (mean + 1e-5) / (max + 1e-5) rank load, so
    that a layer without load counts as 1; then the mean over passes
    (python/sglang/srt/eplb/expert_distribution.py, `compute_utilization_rate`).

    TensorRT-LLM: per layer, the mean over iterations of max / mean rank load - 1; then the mean
    over layers (examples/wide_ep/ep_load_balancer/report_load_statistics.py,
    `calculate_load_statistics`). Its script splits an expert's load evenly over its copies; here
    it is the load that the replay served. Layers without load are left out.
    """

    def over_passes(figures: NDArray[np.float64]) -> _Draws:
        rows = [row[np.isfinite(row)] for row in _rows(batches, figures, with_groups)]
        means = np.array([row.mean() if row.size else np.nan for row in rows])
        return _Draws(float(means[0]), means[1:], "jackknife")

    excess = _rows(batches, batches.excess, with_groups)
    loaded = _rows(batches, batches.loaded, with_groups)
    per_layer = np.divide(excess, loaded, out=np.zeros_like(excess), where=loaded > 0)
    tensorrt = _divide(per_layer.sum(axis=1), (loaded > 0).sum(axis=1))
    return {
        "vllm_balancedness": over_passes(batches.pooled),
        "sglang_balancedness": over_passes(batches.utilization),
        "tensorrt_llm_imbalance_ratio": _Draws(float(tensorrt[0]), tensorrt[1:], "jackknife"),
    }


def _rows(
    batches: BatchFigures, figures: NDArray[np.float64], with_groups: bool
) -> NDArray[np.float64]:
    """Row 0 of `figures` and the rows that leave out a group which has requests."""
    keep = np.r_[True, batches.group_used & with_groups]
    return figures[keep]


def _notes(replay: Replay) -> dict[str, str]:
    own = ("imbalance_batches_mean", "imbalance_batches_p95")
    engines = ("vllm_balancedness", "sglang_balancedness", "tensorrt_llm_imbalance_ratio")
    notes = dict.fromkeys((*own, *engines), replay.batches.how)
    if replay.mixed_batches is not None:
        mixed = ("imbalance_mixed_batches_mean", "imbalance_mixed_batches_p95")
        notes |= dict.fromkeys(mixed, replay.mixed_batches.how)
    return notes


def _divide(above: Any, below: Any) -> NDArray[np.float64]:
    """above / below, NaN where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

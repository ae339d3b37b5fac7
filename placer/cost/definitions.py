"""The figures of a replay by name: unit, direction, natural bounds, description."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class MetricInfo:
    """What a figure means.

    Attributes:
        name: as in JSON output.
        unit: what it counts, "" for a pure ratio.
        better: which direction is good.
        description: one sentence.
        bounds: values that the figure can take; intervals are cut to them.
    """

    name: str
    unit: str
    better: Better
    description: str
    bounds: tuple[float, float] = (0.0, inf)


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("span", "ranks", "lower", "distinct ranks that serve a token's experts in a layer"),
    MetricInfo(
        "messages_alltoall",
        "messages per token-layer",
        "lower",
        "ranks other than the home rank that a token is sent to; the home is fixed",
    ),
    MetricInfo(
        "messages_coherent",
        "messages per token-layer",
        "lower",
        "remote ranks that a token is sent to plus results brought to the primary expert's rank, "
        "which becomes the home",
    ),
    MetricInfo("node_span", "nodes", "lower", "span, counting nodes"),
    MetricInfo(
        "node_messages_alltoall",
        "messages per token-layer",
        "lower",
        "messages_alltoall, counting nodes",
    ),
    MetricInfo(
        "node_messages_coherent",
        "messages per token-layer",
        "lower",
        "messages_coherent, counting nodes",
    ),
    MetricInfo(
        "cross_rank_fraction",
        "",
        "lower",
        "share of expert pairs of consecutive layers on different ranks",
        (0.0, 1.0),
    ),
    MetricInfo(
        "cross_rank_fraction_per_token",
        "",
        "lower",
        "the same, every token's transition between two layers counting once",
        (0.0, 1.0),
    ),
    MetricInfo(
        "cross_node_fraction", "", "lower", "cross_rank_fraction, counting nodes", (0.0, 1.0)
    ),
    MetricInfo(
        "cross_node_fraction_per_token",
        "",
        "lower",
        "cross_rank_fraction_per_token, counting nodes",
        (0.0, 1.0),
    ),
    MetricInfo(
        "imbalance",
        "",
        "lower",
        "max / mean rank load over the whole trace, mean over layers",
        (1.0, inf),
    ),
    MetricInfo(
        "imbalance_batches_mean",
        "",
        "lower",
        "max / mean rank load within a batch, mean over layers, mean over batches",
        (1.0, inf),
    ),
    MetricInfo(
        "imbalance_batches_p95", "", "lower", "the same, 95th percentile over batches", (1.0, inf)
    ),
    MetricInfo(
        "imbalance_mixed_batches_mean",
        "",
        "lower",
        "imbalance_batches_mean with batches mixed from all requests",
        (1.0, inf),
    ),
    MetricInfo(
        "imbalance_mixed_batches_p95",
        "",
        "lower",
        "imbalance_batches_p95 with batches mixed from all requests",
        (1.0, inf),
    ),
    MetricInfo(
        "balancedness",
        "",
        "higher",
        "sum over layers of mean rank load / sum of max rank load, whole trace",
        (0.0, 1.0),
    ),
    MetricInfo(
        "vllm_balancedness",
        "",
        "higher",
        "balancedness of each batch, mean over batches (what vLLM logs of each forward pass)",
        (0.0, 1.0),
    ),
    MetricInfo(
        "sglang_balancedness",
        "",
        "higher",
        "mean over batches of the mean over layers of mean / max rank load (SGLang's definition)",
        (0.0, 1.0),
    ),
    MetricInfo(
        "tensorrt_llm_imbalance_ratio",
        "",
        "lower",
        "max / mean rank load - 1, mean over batches, then over layers (TensorRT-LLM's definition)",
    ),
)

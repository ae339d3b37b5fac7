"""What the order of tokens and requests says: everything of `placer analyze` beyond the counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from placer.affinity.activation import activated_experts
from placer.affinity.clusters import clusterability
from placer.affinity.gaps import information_by_gap, scaled_affinity
from placer.affinity.sample import sample_requests
from placer.affinity.segments import segment_caching, segment_routing
from placer.affinity.stability import load_stability
from placer.trace.source import TraceSource


def routing_details(
    source: TraceSource, num_ranks: Sequence[int], progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Affinity by gap, clusters, stability, segments and activation, as a JSON document.

    All but the stability are taken from a sample of whole requests (about 4 million expert ids).
    Intervals are 95 %, over requests (`placer.affinity.jackknife`).

    Args:
        source: the trace.
        num_ranks: for how many ranks to look for groups.
        progress: told what is being done.
    """
    progress("sampling whole requests")
    sample = sample_requests(source)
    document: dict[str, Any] = {
        "sample": {
            "requests": sample.num_requests,
            "tokens": sample.trace.num_tokens,
            "of_requests": sample.of_requests,
            "of_tokens": sample.of_tokens,
        }
    }
    progress("affinity by the gap between layers")
    document["information_by_gap"] = information_by_gap(sample)
    document["scaled_affinity"] = scaled_affinity(sample)
    progress("groups of experts that fire together")
    document["clusters"] = clusterability(sample, num_ranks)
    progress("load over time")
    document["stability"] = load_stability(source)
    progress("segments and caches")
    document["segments"] = segment_routing(sample)
    document["caches"] = segment_caching(sample)
    progress("activated experts")
    document["activation"] = activated_experts(sample)
    return document

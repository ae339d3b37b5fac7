"""The price of a stale plan: plans fitted to parts of the traffic, judged on every part.

Parts are phases, workload labels, or earlier and later requests. The same requests are held out
whatever the part, so that no plan is judged on a request that any plan was fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from placer.affinity.sample import request_sizes
from placer.placement import Placement, contiguous_like
from placer.planning import Settings
from placer.studies.fitting import Halves, Judge, Progress, figure_names, fit
from placer.trace.model import PHASE_NAMES
from placer.trace.source import TraceSource

MOST_LABELS = 6
LEAST_REQUESTS = 8
"""Of a part, on each side: a plan of fewer says nothing about the part."""

ALL = "all"


def phase_parts(halves: Halves) -> dict[str, Halves]:
    """Prefill and decode, where both occur on both sides."""
    found = {name: halves.part(phase=name) for name in PHASE_NAMES}
    return _those_that_are(found)


def label_parts(halves: Halves, source: TraceSource) -> dict[str, Halves]:
    """The workload labels with the most tokens, at most 6, each of 8 requests on both sides."""
    labels = source.request_labels()
    ids, sizes = request_sizes(source)
    tokens: dict[str, int] = {}
    for request, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        if request in labels:
            tokens[labels[request]] = tokens.get(labels[request], 0) + size
    largest = sorted(tokens, key=lambda label: (-tokens[label], label))[:MOST_LABELS]
    found = {
        label: halves.part(requests=[i for i, name in labels.items() if name == label])
        for label in sorted(largest)
    }
    return _those_that_are(found)


def time_parts(halves: Halves, source: TraceSource) -> dict[str, Halves]:
    """Requests with lower and with higher ids, about half of the tokens each."""
    ids, sizes = request_sizes(source)
    if ids.size < 4:
        return {}
    running = np.cumsum(sizes)
    cut = int(np.abs(running[:-1] - running[-1] / 2).argmin()) + 1
    found = {
        "first half": halves.part(requests=ids[:cut]),
        "second half": halves.part(requests=ids[cut:]),
    }
    return _those_that_are(found)


def transfer(
    parts: Mapping[str, Halves],
    together: Placement,
    settings: Settings,
    progress: Progress = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Rows of the table "fitted to" x "judged on", one at a time.

    Args:
        parts: at least two parts of one trace.
        together: a plan fitted to all parts, "all" in the table.
        settings: of every plan.
        progress: told what is being done.

    Yields:
        `judged_on`, `requests`, `tokens`, and for "contiguous", "all" and every part's plan its
        `figures`, `change` from contiguous placement, and `price`: its change from the part's own
        plan on the same requests, all with intervals.
    """
    plans = {ALL: together}
    for name, halves in parts.items():
        progress(f"fitting a plan to {name}")
        plans[name] = fit(halves.fit, settings).placement
    for name, halves in parts.items():
        judge = Judge(halves.judge, settings)
        progress(f"judging every plan on {name}")
        judge.add("contiguous", contiguous_like(together))
        for fitted_to, placement in plans.items():
            judge.add(fitted_to, placement)
        yield {
            "judged_on": name,
            "requests": judge.num_requests,
            "tokens": judge.num_tokens,
            "figures": list(figure_names(settings)),
            "plans": [
                {
                    "fitted_to": fitted_to,
                    "own": fitted_to == name,
                    "figures": judge.figures(fitted_to),
                    "change": judge.change(fitted_to, "contiguous"),
                    "price": judge.change(fitted_to, name),
                }
                for fitted_to in ("contiguous", *plans)
            ],
        }


def _those_that_are(found: Mapping[str, Halves | None]) -> dict[str, Halves]:
    """Parts with enough requests on both sides; none when only one is left."""
    parts = {
        name: halves
        for name, halves in found.items()
        if halves is not None and halves.fewest_requests() >= LEAST_REQUESTS
    }
    return parts if len(parts) > 1 else {}

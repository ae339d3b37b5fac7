"""A learning curve: what a plan gains on held-out requests, by how much it was fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from placer.placement import Placement, contiguous_like
from placer.planning import Settings, sample_tokens
from placer.studies.fitting import Halves, Judge, Progress, figure_names, fit, headline
from placer.trace.memory import MemorySource
from placer.trace.source import TraceSource
from placer.trace.split import scramble

LEAST_TOKENS = 64
ENOUGH = 0.95
"""Share of the whole profile's gain that counts as enough."""
LOST_BALANCE = 0.05
"""How much higher the imbalance may be then."""


def learning_curve(
    halves: Halves, whole: Placement, settings: Settings, progress: Progress = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Points of the curve, one at a time; all are judged on the same held-out requests.

    Two ways to have less: whole requests (1, 2, 4, ... of them, nested), and single tokens of all
    requests (64, 256, 1024, ... of them).

    Args:
        halves: requests to fit to, and requests that judge.
        whole: a plan fitted to all of the former, the last point of the curve.
        settings: of every plan.
        progress: told what is being done.

    Yields:
        `by` ("requests", "tokens" or "all"), `requests`, `tokens`, and the plan's `figures` and
        `change` from contiguous placement, with intervals.
    """
    judge = Judge(halves.judge, settings)
    judge.add("contiguous", contiguous_like(whole))
    for by, part in _parts(halves, settings):
        requests = int(part.request_ids().size)
        placement = whole
        if by != "all":
            progress(f"fitting a plan to {part.num_tokens:,} tokens of {requests:,} requests")
            placement = fit(part, settings).placement
        judge.add("plan", placement)
        yield {
            "by": by,
            "requests": requests,
            "tokens": part.num_tokens,
            "names": list(figure_names(settings)),
            "figures": judge.figures("plan"),
            "change": judge.change("plan", "contiguous"),
        }


def enough(points: Sequence[dict[str, Any]], settings: Settings, by: str) -> int | None:
    """Fewest requests (or tokens) from which on a plan is as good as one of the whole profile.

    As good: 95 % of its gain in the headline figure, and an imbalance at most 0.05 above its own.
    None where the whole profile gains nothing, or was not reached.
    """
    figure = headline(settings)
    whole = next((point for point in points if point["by"] == "all"), None)
    if whole is None or not _gain(whole, figure) > 0:
        return None
    most_imbalance = whole["figures"]["imbalance"]["value"] + LOST_BALANCE
    found = int(whole[by])
    for point in sorted((p for p in points if p["by"] == by), key=lambda p: -p[by]):
        if _gain(point, figure) < ENOUGH * _gain(whole, figure):
            break
        if point["figures"]["imbalance"]["value"] > most_imbalance:
            break
        found = int(point[by])
    return found


def _gain(point: dict[str, Any], figure: str) -> float:
    return -float(point["change"][figure]["change"] or 0.0)


def _parts(halves: Halves, settings: Settings) -> Iterator[tuple[str, TraceSource]]:
    ids = halves.fit.request_ids()
    order = ids[np.argsort(scramble(ids, settings.seed + 1))]
    yield "all", halves.fit
    count = 1
    while count < ids.size:
        yield "requests", halves.fit.filtered(requests=np.sort(order[:count]))
        count *= 2
    most = LEAST_TOKENS
    while most < halves.fit.num_tokens:
        yield "tokens", MemorySource(sample_tokens(halves.fit, most))
        most *= 4

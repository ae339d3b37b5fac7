"""All studies of a trace, one after the other; Ctrl-C keeps what was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from placer.planning import Settings
from placer.studies.fitting import Progress, fit, halve, headline
from placer.studies.headroom import headroom
from placer.studies.learning import enough, learning_curve
from placer.studies.transfer import label_parts, phase_parts, time_parts, transfer
from placer.trace.source import TraceSource


def deep_analysis(
    source: TraceSource, settings: Settings, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Headroom, separate plans per phase, stale plans, and the learning curve, as JSON.

    Every figure of a plan comes from requests that no plan was fitted to. After Ctrl-C the
    document says `interrupted`, and holds what was finished.
    """
    if settings.dispatch == "allgather":  # whose traffic no placement changes
        settings = replace(settings, objective="balance", max_imbalance=None)
    document: dict[str, Any] = {
        "num_ranks": settings.num_ranks,
        "num_nodes": settings.num_nodes,
        "dispatch": settings.dispatch,
        "objective": settings.objective,
        "max_imbalance": settings.max_imbalance,
        "solver": settings.solver,
        "seed": settings.seed,
        "headline": headline(settings),
        "modelled": True,
        "interrupted": False,
        "headroom": None,
        "phases": [],
        "halves": [],
        "labels": [],
        "learning": [],
        "enough": None,
    }
    halves = halve(source, settings)
    try:
        progress("fitting a plan to all requests to fit to")
        fitted = fit(halves.fit, settings)
        document["slots_per_rank"] = fitted.placement.slots_per_rank
        progress("how much there is to gain")
        document["headroom"] = headroom(halves, fitted, settings)
        for name, parts in (
            ("phases", phase_parts(halves)),
            ("halves", time_parts(halves, source)),
            ("labels", label_parts(halves, source)),
        ):
            if parts:
                for row in transfer(parts, fitted.placement, settings, progress):
                    document[name].append(row)
        for point in learning_curve(halves, fitted.placement, settings, progress):
            document["learning"].append(point)
        document["enough"] = {
            by: enough(document["learning"], settings, by) for by in ("requests", "tokens")
        }
    except KeyboardInterrupt:
        document["interrupted"] = True
    return document

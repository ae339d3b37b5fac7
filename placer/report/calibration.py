"""A calibrated cluster, for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.cluster import Cluster
from placer.report.sheet import Sheet


def cluster_document(cluster: Cluster) -> dict[str, Any]:
    """What is known of a cluster, as JSON."""
    return {
        name: value for name, value in asdict(cluster).items() if value is not None and value != ()
    }


def calibration_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """The cluster's figures, then how well they meet what was measured."""
    cluster, fit = document["cluster"], document["fit"]
    table = Sheet(escape(document["path"]), header=False)
    table.add_column(style="dim")
    table.add_column(words=True)
    for name, value in cluster.items():
        if name in ("name", "pair_gbps", "pair_latency_us"):
            continue
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, escape(text))
    lines: list[RenderableType] = [table]
    errors = [
        f"{what} median {fit[f'{what}_error_median']:.1%}, 90th percentile "
        f"{fit[f'{what}_error_p90']:.1%}"
        for what in ("transfer", "roofline")
        if f"{what}_error_median" in fit
    ]
    lines.append(
        f"measured: {fit['num_probes']} probes x {fit['repeats']} over {fit['backend']}, spread "
        f"{fit['spread']:.1%}; errors of the fit: {'; '.join(errors)}"
    )
    if fit["spread"] > 0.15:
        lines.append(
            "[yellow]the probes spread widely: is the machine busy? measure again when it is "
            "quiet[/]"
        )
    return lines

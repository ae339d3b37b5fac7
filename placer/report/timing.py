"""Modelled step times, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.wording import counted


def timing_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """A row per placement: percentiles over batches, shares, bottlenecks."""
    rows = {name: entry for name, entry in document.items() if name != "cluster"}
    first = next(iter(rows.values()))
    overlap = first["micro_batches"] > 1
    table = Sheet(
        f"modelled step time on {escape(document['cluster'])}, MoE layers only, microseconds "
        f"({counted(first['num_batches'], 'batch', 'batches')}: {first['batches']})",
        "shares of the work; imbalance: what the busiest rank computes beyond the mean; "
        f"computation by {first['compute_by']}"
        + (f"; {first['micro_batches']} micro-batches overlap" if overlap else ""),
    )
    headers = ["placement", "mean", "p50", "p95", "p99", "transfer", "latency", "compute"]
    headers += ["imbalance", *(["hidden"] if overlap else []), "waited for"]
    for header in headers:
        table.add_column(header, words=header == "waited for")
    for name, entry in rows.items():
        if entry["total_us"] is None:
            missing = ", ".join(entry["missing"]) or "no batches"
            if "kv_bytes_per_token" in entry["missing"]:
                missing += " (--model says it)"
            row = ["–"] * (len(headers) - 2)
            table.add_row(escape(name), *row, escape(f"unknown: {missing}"))
            continue
        shares, bottleneck = entry["shares"], entry["bottleneck"]
        waited = [
            f"{prefix}{found['name']} {found['share']:.0%}"
            for prefix, found in (("rank ", bottleneck["rank"]), ("", bottleneck["link"]))
            if found
        ]
        keys = ["transfer", "latency", "compute", "imbalance", *(["hidden"] if overlap else [])]
        table.add_row(
            escape(name),
            *(f"{entry[key]:,.1f}" for key in ("total_us", "total_us_p50", "total_us_p95")),
            f"{entry['total_us_p99']:,.1f}",
            *("–" if shares is None else f"{shares[key]:.0%}" for key in keys),
            "; ".join(waited),
        )
    return ["", table]

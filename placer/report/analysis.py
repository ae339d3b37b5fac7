"""The analysis of a trace for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.tables import number, plain_table

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """A bar per layer."""
    width = max(high - low, 1e-12)
    return "".join(
        "·" if value is None else BARS[1 + round(7 * min(max((value - low) / width, 0.0), 1.0))]
        for value in values
    )


def analysis_tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """Figures of the whole trace, headroom by number of ranks, workloads."""
    overall = document["overall"]
    table = plain_table(
        f"{escape(document['path'])}: {overall['num_tokens']:,} tokens, "
        f"{overall['num_layers']} layers x {overall['num_experts']} experts, "
        f"{number(overall['experts_per_token']['mean'], 2)} per token",
    )
    for header in ("figure", "mean", "least", "most", "by layer"):
        table.add_column(header, no_wrap=True)
    affinity = overall["affinity"]
    pairs, primary = affinity["all_pairs"], affinity["primary"]
    rows = {
        "load of the hottest expert / mean": overall["load"]["max_over_mean"],
        "load, coefficient of variation": overall["load"]["coefficient_of_variation"],
        "experts never used": overall["load"]["never_used"],
        "share of pairs with half of co-activation": overall["coactivation"]["half_share"],
        "information to the next layer, bits a pair": pairs["corrected_bits"],
        "  the same on held-out requests": pairs["held_out_bits"],
        "  between primary experts, bits": primary["corrected_bits"],
        "  normalised (0 independent, 1 decided)": primary["corrected_nmi"],
    }
    for name, entry in rows.items():
        values = [value for value in entry["per_layer"] if value is not None]
        if not values:
            continue
        table.add_row(
            name,
            number(entry["mean"]),
            number(min(values)),
            number(max(values)),
            sparkline(entry["per_layer"], min(0.0, *values), max(values)),
        )
    return [table, *_headroom(overall), *_labels(document["labels"]), *_drift(document["drift"])]


def _headroom(overall: Mapping[str, Any]) -> list[RenderableType]:
    if not overall.get("headroom"):
        return []
    table = plain_table(
        "headroom without replicas",
        "bounds are proven on these tokens, and loose; `placer solve` says what is reached",
    )
    for header in ("ranks", "span of random placement", "span bound", "imbalance bound",
                   "affinity kept at random", "affinity kept, bound"):  # fmt: skip
        table.add_column(header)
    for entry in overall["headroom"]:
        ranks = entry["num_ranks"]
        table.add_row(
            str(ranks),
            number(entry["span_random"]["mean"]),
            number(entry["span_bound"]["mean"]),
            number(entry["imbalance_bound"]["mean"]),
            number(1 / ranks),
            number(entry["affinity_bound"]["mean"]),
        )
    return [table]


def _labels(labels: Mapping[str, Any]) -> list[RenderableType]:
    if not labels:
        return []
    table = plain_table("workloads", "drift: total variation between its load and the others'")
    for header in ("label", "tokens", "hottest / mean", "drift", "by chance"):
        table.add_column(header)
    largest = sorted(labels.items(), key=lambda item: -item[1]["num_tokens"])
    for name, entry in largest[:12]:
        drift = entry["drift_from_rest"]
        table.add_row(
            escape(name) or "(none)",
            f"{entry['num_tokens']:,}",
            number(entry["load"]["max_over_mean"]["mean"]),
            number(drift["total_variation"]["mean"]) if drift else "–",
            number(drift["chance"]["mean"]) if drift else "–",
        )
    if len(largest) > 12:
        table.add_row(f"and {len(largest) - 12} more", "", "", "", "")
    return [table]


def _drift(drift: Mapping[str, Any]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for name, what in (
        ("phases", "between prefill and decode"),
        ("request_halves", "between the first and the second half of the requests"),
    ):
        entry = drift[name]
        if entry is not None:
            lines.append(
                f"load drift {what}: {number(entry['total_variation']['mean'])} "
                f"(chance alone {number(entry['chance']['mean'])}; 0 same, 1 disjoint)"
            )
    return lines

"""The analysis of a trace for people: the answer, then the figures that it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.report.tables import number, titled, with_interval
from placer.wording import counted

BARS = " ▁▂▃▄▅▆▇█"
MOST_BARS = 32
HELPS = {
    "yes": "[bold green]placement can help[/]",
    "little": "[bold yellow]placement can help little[/]",
    "unknown": "[bold]whether placement can help is unknown[/]: give --gpus",
}


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """A bar per layer; with many layers, for every second (third, ...) one."""
    width = max(high - low, 1e-12)
    shown = values[:: -(-len(values) // MOST_BARS) or 1]
    return "".join(
        "·" if value is None else BARS[1 + round(7 * min(max((value - low) / width, 0.0), 1.0))]
        for value in shown
    )


def analysis_tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """The verdict, then figures of the whole trace, by ranks, workloads, time, order of tokens."""
    overall = document["overall"]
    parts: list[RenderableType] = []
    if "verdict" in document:
        parts += verdict_lines(document["verdict"])
    parts += [*_figures(document, overall), *_by_ranks(document)]
    parts += [*_labels(document), *_drift(document)]
    if "routing" in document:
        parts += _routing(document["routing"])
    return parts


def verdict_lines(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """The answer and its reasons."""
    head = HELPS[verdict["can_help"]]
    if verdict["num_ranks"] is not None:
        head += f" at {verdict['num_ranks']} ranks"
    if verdict["by"]:
        head += f": {' and '.join(verdict['by'])}"
    table = Sheet(header=False)
    table.add_column(style="dim")
    table.add_column(words=True)
    for about, text in verdict["reasons"].items():
        table.add_row(f"  {about}", escape(text))
    return [head, table]


def _figures(document: Mapping[str, Any], overall: Mapping[str, Any]) -> list[RenderableType]:
    table = Sheet()
    for header in ("figure", "mean", "least", "most", "by layer"):
        table.add_column(header)
    affinity = overall["affinity"]
    pairs, primary = affinity["all_pairs"], affinity["primary"]
    rows = {
        "load of the hottest expert / mean": overall["load"]["max_over_mean"],
        "load, coefficient of variation": overall["load"]["coefficient_of_variation"],
        "experts never used": overall["load"]["never_used"],
        "share of pairs with half of co-activation": overall["coactivation"]["half_share"],
        "information to next layer, bits a pair": pairs["corrected_bits"],
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
    title = (
        f"{escape(document['path'])}: {counted(overall['num_tokens'], 'token')}, "
        f"{counted(overall['num_layers'], 'layer')} x {overall['num_experts']} experts, "
        f"{number(overall['experts_per_token']['mean'], 2)} per token"
    )
    return titled(title, table)


def _by_ranks(document: Mapping[str, Any]) -> list[RenderableType]:
    if not document["overall"].get("headroom"):
        return []
    clusters = {c["num_ranks"]: c for c in document.get("routing", {}).get("clusters", [])}
    table = Sheet()
    headers = ["ranks", "imbalance", "bound", "span at random", "bound"]
    note = "bounds are proven on these tokens and loose; --deep says what is reached"
    if clusters:
        headers += ["kept at random", "by groups", "bound"]
        note = (
            "kept: share of co-activated pairs on one rank, by groups found on other requests\n"
            + note
        )
    for header in headers:
        table.add_column(header)
    for entry in document["overall"]["headroom"]:
        row = [
            str(entry["num_ranks"]),
            number(entry["imbalance_contiguous"]["mean"]),
            number(entry["imbalance_bound"]["mean"]),
            number(entry["span_random"]["mean"]),
            number(entry["span_bound"]["mean"]),
        ]
        if entry["num_ranks"] in clusters:
            cluster = clusters[entry["num_ranks"]]
            row += [
                number(cluster["kept_at_random"], 2),
                with_interval(cluster["kept"], 2),
                number(cluster["kept_bound"], 2),
            ]
        table.add_row(*row)
    return titled("without replicas", table, note)


def _labels(document: Mapping[str, Any]) -> list[RenderableType]:
    labels = document["labels"]
    if not labels:
        return []
    effect = ((document.get("routing") or {}).get("stability") or {}).get("request_effect")
    table = Sheet()
    for header in ("label", "tokens", "hottest / mean", "drift", "by chance"):
        table.add_column(header)
    largest = sorted(labels.items(), key=lambda item: -item[1]["num_tokens"])
    for name, entry in largest[:8]:
        drift = entry["drift_from_rest"]
        chance = drift["chance"]["mean"] if drift else None
        table.add_row(
            escape(name) or "(none)",
            f"{entry['num_tokens']:,}",
            number(entry["load"]["max_over_mean"]["mean"]),
            number(drift["total_variation"]["mean"]) if drift else "–",
            "–" if chance is None else number(min(1.0, chance * (effect or 1.0))),
        )
    if len(largest) > 8:
        table.add_row(f"and {len(largest) - 8} more", "", "", "", "")
    return titled(
        "workloads",
        table,
        "drift: total variation between its load and the others'; by chance: of whole requests",
    )


def _drift(document: Mapping[str, Any]) -> list[RenderableType]:
    effect = ((document.get("routing") or {}).get("stability") or {}).get("request_effect")
    lines: list[RenderableType] = []
    for name, what in (
        ("phases", "between prefill and decode"),
        ("request_halves", "between the first and the second half of the requests"),
    ):
        entry = document["drift"][name]
        if entry is not None and entry["total_variation"]["mean"] is not None:
            chance = entry["chance"]["mean"] * (effect or 1.0)
            lines.append(
                f"load drift {what}: {number(entry['total_variation']['mean'])} "
                f"(by chance {number(chance)})"
            )
    return ["", *lines] if lines else []


def _routing(routing: Mapping[str, Any]) -> list[RenderableType]:
    sample = routing["sample"]
    lines: list[RenderableType] = [""]
    gaps = [
        f"{entry['gap']}: {number(entry['nmi']['value'], 2)}"
        for entry in routing["information_by_gap"]
        if entry["nmi"]["value"] is not None
    ]
    if gaps:
        lines.append(f"normalised information between layers, by gap: {', '.join(gaps)}")
    scaled = routing["scaled_affinity"]
    if scaled["by_load"] is not None and scaled["held_out"]["value"] is not None:
        lines.append(
            "scaled affinity (0 any next expert, 1 always one): "
            f"{with_interval(scaled['held_out'])}; by load alone {number(scaled['by_load'])}"
        )
    stability = routing["stability"]
    if stability is not None:
        moved = ", ".join(
            number(entry["total_variation"]["value"], 2) for entry in stability["by_lag"]
        )
        lines.append(
            f"load drift between eighths of the requests, 1 to {len(stability['by_lag'])} apart: "
            f"{moved}; by chance {number(stability['floor'], 2)}"
        )
    lines += [*_segments(routing), *_activation(routing)]
    if sample["requests"] < sample["of_requests"]:
        lines.append(
            f"[dim]by order of tokens: from {sample['tokens']:,} tokens of {sample['requests']:,} "
            f"of the {sample['of_requests']:,} requests; brackets: 95 % over requests[/]"
        )
    return lines


def _segments(routing: Mapping[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if routing["segments"]:
        table = Sheet()
        for header in ("tokens", "SRP", "by chance", "size of the set"):
            table.add_column(header)
        for entry in routing["segments"]:
            table.add_row(
                str(entry["segment_tokens"]),
                with_interval(entry["srp"]),
                number(entry["srp_by_chance"]),
                f"{number(entry['experts_kept'], 2)} x",
            )
        parts += titled(
            "segments of a request: can one fixed set of experts serve them?",
            table,
            "SRP: best F1 of such a set (1 = yes); its size in experts of a token",
        )
    if routing["caches"]:
        table = Sheet()
        for header in ("experts", "in experts of a token", "best (SCH)", "LRU"):
            table.add_column(header)
        for entry in routing["caches"]:
            table.add_row(
                str(entry["cache_experts"]),
                f"{number(entry['experts_per_token'], 1)} x",
                with_interval(entry["sch"]),
                with_interval(entry["lru"]),
            )
        parts += titled("a cache of experts per layer: hit rate", table)
    return parts


def _activation(routing: Mapping[str, Any]) -> list[RenderableType]:
    if not routing["activation"]:
        return []
    table = Sheet()
    known = routing["activation"][0]["flops_per_byte"] is not None
    headers = ["tokens", "activated", "share", "independent", "tokens per expert"]
    for header in [*headers, "MB read a token", "FLOPs a byte"] if known else headers:
        table.add_column(header)
    for entry in routing["activation"]:
        cells = [
            str(entry["batch_tokens"]),
            with_interval(entry["activated"], 1),
            f"{entry['share']:.0%}",
            number(entry["independent"], 1),
            number(entry["tokens_per_expert"], 1),
        ]
        if known:
            megabytes = None if entry["bytes_per_token"] is None else entry["bytes_per_token"] / 1e6
            cells += [number(megabytes, 1), number(entry["flops_per_byte"], 1)]
        table.add_row(*cells)
    return titled("experts that a batch of many requests activates, per layer", table)

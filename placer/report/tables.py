"""Tables that people read. Pure functions of documents; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.wording import counted

SHORT = {
    "span": "span (ranks per token)",
    "messages_alltoall": "messages, alltoall",
    "messages_coherent": "messages, coherent",
    "node_span": "node span",
    "node_messages_alltoall": "node messages, alltoall",
    "node_messages_coherent": "node messages, coherent",
    "cross_rank_fraction": "cross-rank fraction",
    "cross_node_fraction": "cross-node fraction",
    "imbalance": "imbalance (max/mean load)",
    "imbalance_batches_p95": "imbalance, p95 over batches",
    "imbalance_mixed_batches_p95": "imbalance, p95 over mixed batches",
    "vllm_balancedness": "balancedness (vLLM)",
    "sglang_balancedness": "balancedness (SGLang)",
    "tensorrt_llm_imbalance_ratio": "imbalance ratio (TensorRT-LLM)",
}
NAMES = SHORT | {
    "imbalance_batches_mean": "imbalance, mean over batches",
    "imbalance_mixed_batches_mean": "imbalance, mean over mixed batches",
    "balancedness": "balancedness, whole trace",
    "cross_rank_fraction_per_token": "cross-rank fraction, per token",
    "cross_node_fraction_per_token": "cross-node fraction, per token",
}
LINKS = {"same_rank": "same rank", "same_node": "same node", "other_node": "other node"}
NODE_FIGURES = (
    "node_span",
    "node_messages_alltoall",
    "node_messages_coherent",
    "cross_node_fraction",
)

GAP_NOTE = "gap: in-sample"
SCOPES = {
    "held-out": "held-out: requests that the plan was not fitted to",
    "unseen": "unseen: a trace that the plan was not fitted to",
    "in-sample": "IN-SAMPLE: the tokens that the plan was fitted to",
}


def titled(title: str, table: Sheet, caption: str = "") -> list[RenderableType]:
    """A blank line, then the table with a title and a caption."""
    table.title, table.caption = title, caption
    return ["", table]


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash for one that is missing."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(entry: Mapping[str, Any], digits: int = 3) -> str:
    """1.234 [1.2, 1.3]"""
    value = number(entry["value"], digits)
    if entry["value"] is None or entry["low"] is None:
        return value
    return f"{value} [dim]\\[{number(entry['low'], digits)}, {number(entry['high'], digits)}][/]"


def change_text(entry: Mapping[str, Any], better: str) -> str:
    """-21.3 % [-22.0, -20.5], green when better beyond chance, red when worse."""
    change = entry["change"]
    if change is None:
        return "–"
    text = f"{100 * change:+.1f} %"
    low, high = entry["change_low"], entry["change_high"]
    if low is None:
        return text
    text += f" [dim]\\[{100 * low:+.1f}, {100 * high:+.1f}][/]"
    if low <= 0 <= high:
        return text
    return f"[{'green' if (change < 0) == (better == 'lower') else 'red'}]{text}[/]"


def evaluation_table(document: Mapping[str, Any], show_all: bool = False) -> list[RenderableType]:
    """A plan beside its baselines, from an evaluation's document."""
    from placer.cost import METRICS

    table = Sheet(*_judged_on(document))
    table.add_column("figure")
    table.add_column("plan")
    for name in document["baselines"]:
        table.add_column(escape(name))
        table.add_column("change", joined=True)
    nodes = document["metrics"].get("node_span", {"value": 1.0})["value"] != 1.0
    for info in METRICS:
        entry = document["metrics"].get(info.name)
        hidden = info.name not in SHORT or (info.name in NODE_FIGURES and not nodes)
        if entry is None or (hidden and not show_all):
            continue
        cells = [NAMES.get(info.name, info.name), with_interval(entry)]
        for name, figures in document["baselines"].items():
            cells += [
                number(figures[info.name]["value"]),
                change_text(document["change"][name][info.name], info.better),
            ]
        table.add_row(*cells)
    return [table]


def _judged_on(document: Mapping[str, Any]) -> tuple[str, str]:
    """Title and caption of an evaluation: what judged the plan, and how."""
    scope, requests, tokens = document["scope"], document["requests"], document["tokens"]
    if document.get("kind") == "load":
        windows = (
            f"{counted(document['windows'], 'window')}, "
            f"{counted(document['pairs'], 'token-expert pair')}"
        )
        title = (
            f"IN-SAMPLE: the load that the plan was fitted to ({windows})"
            if scope == "in-sample"
            else f"held-out: later windows than the plan was fitted to ({windows})"
        )
        return title, "a load record: balance only; modelled, copies share an expert's load evenly"
    return (
        f"{SCOPES[scope]} ({counted(requests, 'request')}, {counted(tokens, 'token')})",
        f"dispatch {document['dispatch']}; modelled by replay; brackets: 95 % over requests",
    )


def compiling_text(document: Mapping[str, Any], seconds: str) -> str:
    """Seconds of work, and beside them those of compiling, where a document has any."""
    compiling = document.get("compile_s")
    if compiling is None:
        return seconds
    return f"{seconds}; {compiling:.0f} s more for compiling, once per machine"


def certificate_line(certificate: Mapping[str, Any]) -> str:
    """How good the plan provably is, in one line."""
    value, bound = certificate["value"], certificate["lower_bound"]
    text = f"{certificate['status']}: {certificate['objective']} = {number(value, 4)} in-sample"
    if bound is None:
        return text + "; no bound is proven"
    of = certificate.get("bound_of") or "objective"
    figure = "" if of == "objective" else f" of {of}"
    cap = certificate.get("max_imbalance")
    among = "" if cap is None else f" among plans of imbalance {number(cap)} or less"
    gap = "" if certificate["gap"] is None else f", gap {certificate['gap']:.1%}"
    return text + f"; proven lower bound{figure} {number(bound, 4)}{gap}{among}"


def gap_text(row: Mapping[str, Any]) -> str:
    """The proven gap, and of which figure when it is not of the objective."""
    if row["gap"] is None:
        return "–"
    of = row["bound_of"]
    return f"{row['gap']:.1%}" + ("" if of in (None, "objective") else f" {of.split('_')[0]}")


def comparison_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """Every solver on the same held-out tokens; those that failed below."""
    messages = f"messages_{document['dispatch']}"
    if messages not in document["rows"][0]["metrics"]:
        messages = "messages_alltoall"
    table = Sheet(
        f"{SCOPES[document['scope']]} ({counted(document['requests'], 'request')}, "
        f"{counted(document['tokens'], 'token')})",
        f"{counted(document['num_ranks'], 'rank')} on {counted(document['num_nodes'], 'node')}, "
        f"{counted(document['slots_per_rank'], 'slot')} per rank; modelled by replay; "
        "brackets: 95 % over requests; change against contiguous",
    )
    nodes = document["num_nodes"] > 1
    for header in ("solver", "messages", "change", "node messages" if nodes else None, "imbalance",
                   "p95 batches", "cross-rank", "gap", "solve"):  # fmt: skip
        if header:
            table.add_column(header, joined=header in ("change", "p95 batches"))
    best = _best_rows(document["rows"], messages)
    for row in document["rows"]:
        figures, change = row["metrics"], row["change"]
        node_messages = f"node_{messages}"
        cells = [
            f"[bold]{row['solver']}[/]" if row["solver"] in best else row["solver"],
            with_interval(figures[messages]),
            change_text(change[messages], "lower") if row["solver"] != "contiguous" else "",
            number(figures[node_messages]["value"]) if nodes else None,
            with_interval(figures["imbalance"]),
            number(figures["imbalance_batches_p95"]["value"]),
            number(figures["cross_rank_fraction"]["value"]),
            gap_text(row),
            f"{row['seconds']:.2f} s",
        ]
        table.add_row(*(cell for cell in cells if cell is not None))
    as_balanced = any(row.get("bound_max_imbalance") is not None for row in document["rows"])
    if any(row["gap"] is not None for row in document["rows"]):
        table.caption += f"; {GAP_NOTE}{', to plans that are as balanced' if as_balanced else ''}"
    if "compile_s" in document:
        table.caption += compiling_text(document, "")
    failed = [
        f"[red]{entry['solver']}:[/] {escape(entry['error'])}" for entry in document["failed"]
    ]
    return [table, *failed]


def _best_rows(rows: Sequence[Mapping[str, Any]], messages: str) -> set[str]:
    """Solvers that no other beats in both messages and imbalance."""

    def point(row: Mapping[str, Any]) -> tuple[float, float]:
        values = (row["metrics"][name]["value"] for name in (messages, "imbalance"))
        sent, imbalance = (0.0 if value is None else value for value in values)  # None: no load
        return sent, imbalance

    return {
        row["solver"]
        for row in rows
        if not any(
            other is not row
            and point(other)[0] <= point(row)[0]
            and point(other)[1] <= point(row)[1]
            and point(other) != point(row)
            for other in rows
        )
    }

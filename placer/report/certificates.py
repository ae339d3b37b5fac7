"""Proven bounds for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.report.tables import NAMES, SCOPES, compiling_text, number
from placer.wording import counted

_SCOPES = SCOPES | {
    "in-sample": "IN-SAMPLE: all tokens, also those that the plan was fitted to; `placer evaluate` "
    "says what it does on others"
}


def certificate_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """What `placer certify` found."""
    title = f"[bold]{escape(document['plan'])}[/] on {escape(document['trace'])}"
    of = (
        f"{_SCOPES[document['scope']]} ("
        f"{counted(document['requests'], 'request')}, {counted(document['tokens'], 'token')})"
    )
    sampled = document["sampled_tokens"]
    note = (
        f" Span and messages are of a sample of {sampled:,} tokens."
        if sampled < document["tokens"]
        else ""
    )
    took = compiling_text(document, f"{document['seconds'] - document.get('compile_s', 0.0):.1f} s")
    return [
        title,
        of,
        bounds_table(document["bounds"]),
        "[dim]proven: no plan with as many ranks and slots is below the bound on these tokens."
        f"{note} {took}[/]",
    ]


def bounds_table(bounds: Sequence[Mapping[str, Any]]) -> Sheet:
    """Value, bound and gap of each figure."""
    table = Sheet()
    for header in ("figure", "plan", "proven lower bound", "gap at most", "by"):
        table.add_column(header, words=header == "by")
    for bound in bounds:
        table.add_row(
            NAMES.get(bound["figure"], bound["figure"].replace("_", " ")),
            number(bound["value"], 4),
            number(bound["lower_bound"], 4),
            gap_percent(bound["gap"]),
            bound["method"] + among(bound),
        )
    return table


def among(bound: Mapping[str, Any]) -> str:
    """Which plans the bound is about, if not all."""
    cap = bound.get("max_imbalance")
    return "" if cap is None else f", imbalance at most {number(cap)}"


def gap_percent(gap: float) -> str:
    """0 for what is exact, else a share in percent."""
    return "0 (optimal)" if gap <= 1e-9 else f"{100 * gap:.2f} %"

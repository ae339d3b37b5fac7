"""Headroom, stale plans and learning curves for people. Pure functions of the deep document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.report.tables import change_text, number, titled, with_interval

TRANSFERS = {
    "phases": "one plan for both phases, or one each",
    "halves": "a plan that is out of date: earlier and later requests",
    "labels": "a plan of another workload",
}


def deep_tables(deep: Mapping[str, Any]) -> list[RenderableType]:
    """All studies that were finished."""
    nodes = f" on {deep['num_nodes']} nodes" if deep["num_nodes"] > 1 else ""
    cap = deep["max_imbalance"]
    head = f"[bold]plans for {deep['num_ranks']} ranks{nodes}[/], dispatch {deep['dispatch']}"
    head += "" if cap is None else f", imbalance at most {cap:.2f} in-sample"
    parts: list[RenderableType] = ["", f"{head}; figures modelled by replay of held-out requests"]
    if deep["headroom"] is not None:
        parts += _headroom(deep)
    for name, title in TRANSFERS.items():
        if deep[name]:
            parts += _transfer(deep[name], deep["headline"], title)
    if deep["learning"]:
        parts += _learning(deep)
    if deep["interrupted"]:
        parts += ["", "[yellow]interrupted: what is missing above was not reached[/]"]
    return parts


def _headroom(deep: Mapping[str, Any]) -> list[RenderableType]:
    found = deep["headroom"]
    table = Sheet()
    for header in ("objective", "contiguous", "reached", "bound", "gain", "at most", "held out"):
        table.add_column(header)
    change = found["held_out"]["change"][deep["headline"]]
    rows = [(found, change_text(change, "lower"))]
    if deep["headline"] != "imbalance":
        rows.append((found["balance"], ""))
    for row, held_out in rows:
        table.add_row(
            row["figure"],
            *(number(row[name]) for name in ("contiguous", "reached", "bound")),
            *(_share(row[name]) for name in ("gain_reached", "gain_at_most")),
            held_out,
        )
    figures = found["held_out"]
    lines = titled(
        "headroom",
        table,
        "gain over contiguous placement; bounds hold for the tokens that plans were fitted to",
    )
    return lines + [
        f"held out, {name}: {with_interval(figures['plan'][name])}, "
        f"contiguous {with_interval(figures['contiguous'][name])}"
        for name in figures["figures"]
    ]


def _transfer(rows: Sequence[Mapping[str, Any]], headline: str, title: str) -> list[RenderableType]:
    messages = headline != "imbalance"
    if len(rows) > 3:  # two narrow tables
        where = f"{title}: on held-out requests"
        parts: list[RenderableType] = []
        if messages:
            parts += _matrix(rows, headline, f"{where}, change of messages against contiguous, %")
        return parts + _matrix(rows, None, f"{where}, imbalance")
    table = Sheet()
    table.add_column("judged on")
    for plan in rows[0]["plans"]:
        table.add_column(escape(plan["fitted_to"]))
    table.add_column("price of all")
    for row in rows:
        cells, price = [escape(row["judged_on"])], ""
        for plan in row["plans"]:
            text = number(plan["figures"]["imbalance"]["value"], 2)
            if messages and plan["fitted_to"] != "contiguous":
                text = f"{_signed(plan['change'][headline]['change'])} {text}"
            cells.append(f"[bold]{text}[/]" if plan["own"] else text)
            if plan["fitted_to"] == "all":
                price = change_text(plan["price"][headline], "lower")
        table.add_row(*cells, price)
    what = "change of messages against contiguous, and imbalance" if messages else "imbalance"
    return titled(
        title,
        table,
        f"{what}, on held-out requests; bold: the part's own plan\n"
        "price of all: what the plan for all costs instead of the own one",
    )


def _matrix(
    rows: Sequence[Mapping[str, Any]], headline: str | None, title: str
) -> list[RenderableType]:
    """Parts x plans: change of the headline figure, or imbalance."""
    table = Sheet()
    table.add_column("judged on \\ fitted to")
    first = 0 if headline is None else 1  # contiguous placement does not differ from itself
    for plan in rows[0]["plans"][first:]:
        table.add_column(escape(plan["fitted_to"]))
    for row in rows:
        cells = [escape(row["judged_on"])]
        for plan in row["plans"][first:]:
            if headline is None:
                text = number(plan["figures"]["imbalance"]["value"], 2)
            else:
                text = _signed(plan["change"][headline]["change"]).removesuffix(" %")
            cells.append(f"[bold]{text}[/]" if plan["own"] else text)
        table.add_row(*cells)
    return titled(title, table)


def _learning(deep: Mapping[str, Any]) -> list[RenderableType]:
    headline = deep["headline"]
    table = Sheet()
    headers = ["fitted to", "requests", "tokens", "change against contiguous", "imbalance"]
    for header in headers:
        table.add_column(header)
    kinds = {"requests": "whole requests", "tokens": "single tokens", "all": "everything"}
    order = list(kinds)
    for point in sorted(deep["learning"], key=lambda p: (order.index(p["by"]), p["tokens"])):
        table.add_row(
            kinds[point["by"]],
            f"{point['requests']:,}",
            f"{point['tokens']:,}",
            change_text(point["change"][headline], "lower"),
            number(point["figures"]["imbalance"]["value"], 2),
        )
    lines = titled("how much to profile: judged on the same held-out requests", table)
    enough = deep["enough"]
    if enough is not None and enough["requests"] is not None:
        lines.append(
            f"as good as everything (95 % of the gain, imbalance within 0.05): "
            f"{enough['requests']:,} whole requests, or {enough['tokens']:,} tokens of all requests"
        )
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"

"""A frontier for people: a table, a picture, and the files of its plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.files import atomic_path, check_output_folder, write_json
from placer.plan import write_plan
from placer.planning import Frontier
from placer.planning.frontier import plan_name
from placer.report.sheet import Sheet
from placer.report.tables import NAMES, SCOPES, number, titled

TABLE, PICTURE = "frontier.json", "frontier.svg"
OURS, THEIRS = "#0a7d4f", "#b03a2e"
# of the picture's file: without a date and with fixed ids it is the same for the same plans
REPEATABLE = {"svg.hashsalt": "placer", "svg.fonttype": "none"}


def frontier_folder(plan: Path) -> Path:
    """Where the points of a frontier lie whose knee is written to `plan`."""
    return plan.with_name(f"{plan.stem}.frontier")


def write_frontier(frontier: Frontier, plan: Path, *, force: bool = False) -> Path:
    """Write every point's plan, the table and the picture beside `plan`; returns the folder.

    Raises:
        UsageError: the folder holds something and may not be replaced.
    """
    folder = frontier_folder(plan)
    check_output_folder(folder, force)
    folder.mkdir(exist_ok=True)
    for old in folder.glob("plan-*.json"):
        old.unlink()
    for index, point in enumerate(frontier.points):
        write_plan(point.plan, folder / plan_name(index), force=True)
    write_json(folder / TABLE, frontier.to_document(), force=True)
    with atomic_path(folder / PICTURE, force=True) as temporary:
        draw_frontier(frontier.to_document(), temporary)
    return folder


def frontier_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """The points in order, the knee marked, and load-only placements below."""
    figures = document["figures"]
    table = Sheet()
    table.add_column("plan")
    for figure in figures:
        table.add_column(NAMES[figure], justify="right")
    for point in document["points"]:
        name = point["plan"] + ("  <- knee" if point["knee"] else "")
        cells = [number(point["metrics"][figure]["value"]) for figure in figures]
        table.add_row(name, *cells, style="bold" if point["knee"] else "")
    for name, metrics in document["peers"].items():
        cells = [number(metrics[figure]["value"]) for figure in figures]
        table.add_row(escape(name), *cells, style="dim")
    caption = f"{SCOPES[document['scope']]}; plans, table and picture: {document['path']}"
    return titled("frontier between messages and imbalance", table, escape(caption))


def draw_frontier(document: Mapping[str, Any], path: Path) -> None:
    """An SVG: messages over imbalance, with intervals, the knee and load-only placements."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    messages = document["figures"][0]
    with plt.rc_context(REPEATABLE):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        points = [point["metrics"] for point in document["points"]]
        _scatter(axes, points, messages, OURS, "placer, point by point")
        axes.plot(*_curve(points, messages), color=OURS, linewidth=1.5)
        for point in document["points"]:
            if point["knee"]:
                at = (_value(point["metrics"], "imbalance"), _value(point["metrics"], messages))
                axes.annotate("knee", at, (8, 8), textcoords="offset points", color=OURS)
        for name, metrics in document["peers"].items():
            _scatter(axes, [metrics], messages, THEIRS, None)
            at = (_value(metrics, "imbalance"), _value(metrics, messages))
            axes.annotate(name, at, (8, 4), textcoords="offset points", color=THEIRS)
        axes.set_xlabel("imbalance: max / mean rank load (1 is perfect)")
        axes.set_ylabel("messages per token and layer")
        axes.set_title(f"Frontier, {document['scope']} tokens")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _value(metrics: Mapping[str, Any], figure: str) -> float:
    return float(metrics[figure]["value"])


def _curve(points: list[Mapping[str, Any]], messages: str) -> tuple[list[float], list[float]]:
    ordered = sorted(points, key=lambda metrics: _value(metrics, "imbalance"))
    return [_value(m, "imbalance") for m in ordered], [_value(m, messages) for m in ordered]


def _scatter(
    axes: Any, points: list[Mapping[str, Any]], messages: str, colour: str, label: str | None
) -> None:
    """Points with their intervals as thin bars, where there are any."""
    x, y = _curve(points, messages)
    axes.scatter(x, y, color=colour, s=22, zorder=3, label=label)
    for metrics in points:
        here, there = metrics["imbalance"], metrics[messages]
        if here["low"] is not None:
            axes.plot([here["low"], here["high"]], [there["value"]] * 2, color=colour, alpha=0.3)
        if there["low"] is not None:
            axes.plot([here["value"]] * 2, [there["low"], there["high"]], color=colour, alpha=0.3)

"""Plots of a sweep: messages, balance and step time along its longest dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from placer.report.plots import style, to_svg
from placer.report.sweep import DIMENSIONS

_NUMBERS = ("num_ranks", "batch_tokens", "spare_slots", "num_nodes")
_MOST_LINES = 8
_GIVEN_UP = ("batch_tokens", "cluster", "num_nodes", "spare_slots", "dispatch")  # in this order


def sweep_svg(document: Mapping[str, Any]) -> str | None:
    """One SVG file; None where no cell has a plan."""
    cells = [cell for cell in document["cells"] if cell["result"] is not None]
    if not cells:
        return None
    along = max(_NUMBERS, key=lambda name: len({cell["config"][name] for cell in cells}))
    cells, fixed = _few_lines(cells, along)
    lines = _lines(cells, along)
    panels = [("change of messages, %", _messages), ("imbalance, p95 of batches", _balance)]
    if any(cell["result"]["step_time"] for cell in cells):
        panels.append(("modelled step time, us", _time))
    with style() as figure_class:
        figure = figure_class(figsize=(4.2 * len(panels), 3.6), layout="constrained")
        for axes, (title, draw) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for name, members in lines.items():
                draw(axes, sorted(members, key=lambda c: c["config"][along]), along, name)
            values = sorted({cell["config"][along] for cell in cells})
            if len(values) > 1 and values[0] > 0 and values[-1] / values[0] >= 4:
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            axes.set_xlabel(DIMENSIONS[along])
            axes.set_title(title)
        if len(lines) > 1:
            handles, names = figure.axes[1].get_legend_handles_labels()
            columns = max(1, int(60 * len(panels) / (12 + max(len(name) for name in names))))
            figure.legend(handles, names, loc="outside lower center", ncols=columns)
        dotted = "dotted: contiguous placement"
        figure.suptitle(", ".join([*fixed, dotted]), fontsize=9)
        return to_svg(figure, "sweep", standalone=True)


def _few_lines(
    cells: list[Mapping[str, Any]], along: str
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The cells of at most 8 lines, and at which values other dimensions were fixed for it."""
    fixed = []
    for name in _GIVEN_UP:
        values = sorted({cell["config"][name] for cell in cells})
        if name == along or len(values) == 1 or len(_lines(cells, along)) <= _MOST_LINES:
            continue
        cells = [cell for cell in cells if cell["config"][name] == values[-1]]
        fixed.append(_words(name, values[-1]))
    return cells, fixed


def _lines(cells: list[Mapping[str, Any]], along: str) -> dict[str, list[Mapping[str, Any]]]:
    """Cells by what their line is called: the dimensions that differ."""
    names = [
        name
        for name in DIMENSIONS
        if name != along and len({cell["config"][name] for cell in cells}) > 1
    ]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        called = ", ".join(_words(name, cell["config"][name]) for name in names) or "plan"
        lines.setdefault(called, []).append(cell)
    return lines


def _words(name: str, value: Any) -> str:
    if name == "cluster":
        return value or "no cluster"
    if name == "batch_tokens":
        return f"batches of {value}"
    return str(value) if name == "dispatch" else f"{value} {DIMENSIONS[name]}"


def _messages(axes: Any, cells: list[Mapping[str, Any]], along: str, name: str) -> None:
    points: list[tuple[Any, float, float, float]] = []
    for cell in cells:
        result = cell["result"]
        if result["headline"] == "imbalance":
            continue
        entry = result["figures"][result["headline"]]
        change = entry["change"]
        if change is None:  # against a baseline that sends nothing
            continue
        low, high = (
            change if entry[end] is None else entry[end] for end in ("change_low", "change_high")
        )
        x = cell["config"][along]
        points.append((x, 100 * change, 100 * (change - low), 100 * (high - change)))
    if not points:
        return
    x_of, middle, below, above = zip(*points, strict=True)
    axes.errorbar(x_of, middle, yerr=[below, above], marker="o", ms=4, label=name)


def _balance(axes: Any, cells: list[Mapping[str, Any]], along: str, name: str) -> None:
    x = [cell["config"][along] for cell in cells]
    figures = [cell["result"]["figures"]["imbalance_mixed_batches_p95"] for cell in cells]
    (line,) = axes.plot(x, [entry["value"] for entry in figures], marker="o", ms=4, label=name)
    before = [entry["contiguous"] for entry in figures]
    axes.plot(x, before, ls=":", color=line.get_color(), alpha=0.7)


def _time(axes: Any, cells: list[Mapping[str, Any]], along: str, name: str) -> None:
    timed = [cell for cell in cells if (cell["result"]["step_time"] or {}).get("plan_us")]
    x = [cell["config"][along] for cell in timed]
    (line,) = axes.plot(
        x, [cell["result"]["step_time"]["plan_us"] for cell in timed], marker="o", ms=4, label=name
    )
    before = [cell["result"]["step_time"]["contiguous_us"] for cell in timed]
    axes.plot(x, before, ls=":", color=line.get_color(), alpha=0.7)

"""A sweep for people: a table, a CSV file and plots. Pure functions of its document."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.report.tables import change_text, number, titled
from placer.wording import counted

DIMENSIONS = {
    "num_ranks": "GPUs",
    "num_nodes": "nodes",
    "spare_slots": "spare slots",
    "dispatch": "dispatch",
    "cluster": "cluster",
    "batch_tokens": "batch",
}


def varying(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dimensions that differ between cells, the number of GPUs always."""
    return [
        name
        for name in DIMENSIONS
        if name == "num_ranks" or len({cell["config"][name] for cell in cells}) > 1
    ]


def sweep_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """A row per cell."""
    cells = document["cells"]
    if not cells:
        return ["no cell was finished"]
    names = varying(cells)
    table = Sheet(keys=len(names))
    for name in names:
        table.add_column(DIMENSIONS[name])
    timed = any(c["result"] and c["result"]["step_time"] for c in cells)
    headers = ["change of messages", "imbalance", "p95 batches", "contig."]
    for header in [*headers, "step time"] if timed else headers:
        table.add_column(header)
    refused: dict[str, int] = {}
    for cell in cells:
        row = [escape(str(cell["config"][name]) or "–") for name in names]
        if cell["error"] is not None:
            message = cell["error"]["message"]
            refused[message] = refused.get(message, 0) + 1
            continue
        table.add_row(*row, *_figures(cell["result"], timed))
    fixed = [
        f"{DIMENSIONS[name]} {cells[0]['config'][name]}"
        for name in DIMENSIONS
        if name not in names and cells[0]["config"][name] not in ("", 0)
    ]
    requests = next((c["result"]["requests"] for c in cells if c["result"]), None)
    plans = len(cells) - sum(refused.values())
    what = f"{counted(plans, 'cell')}, judged on held-out requests"
    what += "" if requests is None else f" ({requests:,})"
    lines = titled(
        f"{what}; modelled by replay; {', '.join(fixed)}",
        table,
        "change: against contiguous placement on the same ranks; p95 batches: imbalance of\n"
        "batches mixed from all requests, of the plan and of contiguous placement",
    )
    lines += [
        f"[yellow]no plan for {counted(count, 'cell')}:[/] {escape(message)}"
        for message, count in refused.items()
    ]
    unknown = {
        name
        for cell in cells
        if cell["result"] and cell["result"]["step_time"]
        for name in cell["result"]["step_time"]["missing"]
    }
    if unknown:
        lines.append(f"step time is unknown without {', '.join(sorted(unknown))}")
    if document["interrupted"]:
        missing = document["missing"]
        lines.append(
            f"[yellow]interrupted: {counted(missing, 'cell is', 'cells are')} missing[/]; "
            "run it again"
        )
    return lines


def _figures(result: Mapping[str, Any], timed: bool) -> list[str]:
    figures = result["figures"]
    batches = figures["imbalance_mixed_batches_p95"]
    messages = result["headline"]
    row = [
        "–" if messages == "imbalance" else change_text(figures[messages], "lower"),
        number(figures["imbalance"]["value"], 2),
        number(batches["value"], 2),
        number(batches["contiguous"], 2),
    ]
    if timed:
        row.append(_step_time(result["step_time"]))
    return row


def _step_time(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["plan_us"] is None:
        return "–"
    return f"{entry['plan_us']:.0f} us, {100 * entry['change']:+.1f} %"


def sweep_csv(document: Mapping[str, Any]) -> str:
    """All figures, a line per cell."""
    rows = [_flat(cell) for cell in document["cells"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    row = {**cell["config"], "error": (cell["error"] or {}).get("message")}
    result = cell["result"]
    if result is None:
        return row
    for name in ("requests", "tokens", "slots_per_rank", "headline"):
        row[name] = result[name]
    for figure, entry in result["figures"].items():
        row[figure] = entry["value"]
        row |= {f"{figure}_{key}": value for key, value in entry.items() if key != "value"}
    row |= {f"certificate_{key}": value for key, value in result["certificate"].items()}
    timed = result["step_time"] or {}
    row |= {f"step_time_{key}": timed.get(key) for key in ("plan_us", "contiguous_us", "change")}
    return row

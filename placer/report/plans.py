"""A plan for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.certificates import bounds_table
from placer.report.sheet import Sheet
from placer.report.tables import (
    NAMES,
    certificate_line,
    compiling_text,
    evaluation_table,
    number,
    titled,
)
from placer.report.timing import timing_table
from placer.wording import counted

BOUNDS_TITLE = "proven on the tokens that the plan was fitted to: no plan is below the bound"

ENDED = {"time_limit": ", ended by the time limit", "interrupted": ", ended by Ctrl-C"}


def plan_summary(document: Mapping[str, Any]) -> list[RenderableType]:
    """What a plan file says, from its document; "path" names the file."""
    layers, slots = len(document["layer_ids"]), document["slots_per_rank"]
    nodes = document["num_ranks"] // document["ranks_per_node"]
    filled = sum(slot >= 0 for row in document["physical_to_logical"] for slot in row)
    replicas = filled - layers * document["num_experts"]
    each = "1 replica" if replicas == layers else f"{replicas / layers:.3g} replicas"
    lines: list[RenderableType] = [
        f"[bold]{escape(document['path'])}[/]: {counted(layers, 'layer')} x "
        f"{document['num_experts']} experts on {counted(document['num_ranks'], 'rank')} "
        f"({counted(nodes, 'node')}), {counted(slots, 'slot')} per rank, {each} per layer, "
        f"dispatch {document['dispatch']}"
    ]
    prediction, certificate = document["prediction"], document["certificate"]
    if prediction:
        lines += evaluation_table(prediction)
        if "workloads" in prediction:
            lines += workload_table(prediction["workloads"])
        if "step_time" in prediction:
            lines += timing_table(prediction["step_time"])
    if certificate:
        seconds = document["timings"].get("solve_s")
        solver = document["provenance"].get("solver", "unknown solver")
        ended = ENDED.get(certificate.get("termination"), "")
        spent = "" if seconds is None else f"{solver}, {seconds:.1f} s{ended}"
        took = spent and f" ({compiling_text(document['timings'], spent)})"
        lines.append(certificate_line(certificate) + took)
        moves = certificate.get("parts", {}).get("moves")
        if moves is not None:
            start = escape(str(document["provenance"]["settings"]["start"]))
            lines.append(
                f"{counted(int(moves), 'expert copy', 'expert copies')} moved from {start}"
            )
        if len(certificate.get("bounds", [])) > 1:
            lines += titled(BOUNDS_TITLE, bounds_table(certificate["bounds"]))
    return lines


def workload_table(workloads: Mapping[str, Any]) -> list[RenderableType]:
    """How a plan and the contiguous one do on each workload."""
    table = Sheet()
    table.add_column("workload")
    table.add_column("requests", justify="right")
    figures = list(next(iter(workloads.values()))["metrics"])
    for figure in figures:
        table.add_column(NAMES[figure], justify="right")
    for name, row in workloads.items():
        cells = [
            f"{number(row['metrics'][figure]['value'])} "
            f"[dim]({number(row['contiguous'][figure]['value'])})[/]"
            for figure in figures
        ]
        table.add_row(escape(name), str(row["requests"]), *cells)
    return titled("each workload", table, "in brackets: contiguous placement")

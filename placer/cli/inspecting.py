"""`placer inspect`: what is in this trace or plan, and is it sound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A trace, a load record or a plan.")],
    json_output: options.JsonOutput = False,
) -> None:
    """Say what a trace, load record or plan holds, and if it is sound. Exit code 5 when not."""
    from placer.errors import BadFileError
    from placer.report.console import progress_status, show
    from placer.report.inspection import inspection_lines, load_lines
    from placer.report.plans import plan_summary

    if path.suffix == ".json" and path.name != "manifest.json":
        plan = inspect_plan(path)
        show(json_output, plan, lambda: plan_summary(plan))
        return
    from placer.trace import inspect_trace
    from placer.trace.load import inspect_load, is_load

    if is_load(path):
        load = inspect_load(path)
        show(json_output, load, lambda: load_lines(load))
        return
    with progress_status() as progress:
        progress("going through the trace")
        document = inspect_trace(path)
    show(json_output, document, lambda: inspection_lines(document))
    if not document["sound"]:
        raise BadFileError(f"{path} is not sound: {document['problems'][0]}", "trace again")


def inspect_plan(path: Path) -> dict[str, Any]:
    """A plan file's own document, checked."""
    from placer.plan import read_plan

    return {"kind": "plan", "path": str(path), "sound": True, **read_plan(path).to_document()}

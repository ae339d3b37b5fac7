"""`placer demo`: the whole pipeline on the shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("demo")(demo)


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the trace and the plan.")
    ] = Path("placer-demo"),
    seed: options.Seed = 0,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Trace the shipped model, analyze its routing, compare solvers, write a plan.

    Takes about a minute on two cores.
    """
    from rich.markup import escape

    from placer.demo import NUM_RANKS, run_demo
    from placer.files import refuse_overwrite
    from placer.report.analysis import analysis_tables
    from placer.report.console import progress_status, show
    from placer.report.plans import plan_summary
    from placer.report.tables import comparison_table
    from placer.report.tracing import tracing_lines

    for name in ("trace", "plan.json"):
        refuse_overwrite(output / name, force)
    with progress_status() as progress:
        made = run_demo(output, seed=seed, force=force, progress=progress)
    show(
        json_output,
        made.to_document(),
        lambda: [
            *tracing_lines(made.summary),
            "",
            *analysis_tables(made.analysis),
            "",
            *plan_summary(made.plan_document),
            escape(f"to see more: placer evaluate {made.plan} {made.trace} --all"),
            f"\n[bold]plans for {NUM_RANKS} ranks[/]",
            *comparison_table(made.comparison),
        ],
    )

"""`placer report`: one self-contained page about a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("report")(report)


def report(
    plan_path: options.PlanFile,
    trace: options.OneTrace,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")],
    baseline: options.Baselines = None,
    all_requests: options.AllRequests = False,
    phase: options.Phase = None,
    batch_tokens: options.BatchTokens = 256,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Write one page with figures and plots: no other file, no network.

    The tokens that judge the plan are those of `placer evaluate`. Plots compare it with the first
    baseline. --json prints what the page shows.

    Example: placer report plan.json trace -o report.html
    """
    from rich.markup import escape

    from placer.baselines import baseline_placement
    from placer.cli.evaluate import plan_replica_policy
    from placer.files import atomic_path, check_output_file
    from placer.plan import read_plan
    from placer.planning import judging_part, open_traces
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.plan_page import plan_page
    from placer.studies.plan_report import report_document

    check_output_file(output, force)
    plan = read_plan(plan_path)
    baselines = {name: baseline_placement(name, plan) for name in baseline or ["contiguous"]}
    with progress_status() as progress:
        progress("reading the trace")
        source = open_traces([trace])[0]
        show_warnings(source.warnings)
        part, scope = judging_part(
            source, plan, phase=phase.value if phase else None, all_requests=all_requests
        )
        document = report_document(
            plan,
            baselines,
            part,
            scope=scope,
            replica_policy=plan_replica_policy(plan).value,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        document["paths"] = {"plan": str(plan_path), "trace": str(trace)}
        progress("drawing")
        html = plan_page(document)
        with atomic_path(output, force=force) as temporary:
            temporary.write_text(html, encoding="utf-8")
    size = f"{len(html.encode()) / 1e3:,.0f} kB"
    show(
        json_output,
        {"path": str(output), **document},
        lambda: [f"written: [bold]{escape(str(output))}[/] ({size}), open it in a browser"],
    )

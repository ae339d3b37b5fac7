"""`placer certify`: how far from the optimum a plan can be at most."""

from __future__ import annotations

from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("certify")(certify)


def certify(
    plan_path: options.PlanFile,
    trace: options.OneTrace,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="For all proofs together.")
    ] = 60.0,
    figure: Annotated[
        list[str] | None,
        typer.Option("--figure", help="Only this one, e.g. cross_rank_fraction; repeatable."),
    ] = None,
    phase: options.Phase = None,
    any_imbalance: Annotated[
        bool,
        typer.Option(
            "--any-imbalance",
            help="Bound span and messages of all plans, also of those that are less balanced.",
        ),
    ] = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Prove lower bounds on a plan's figures, on all tokens of a trace.

    For any plan, whoever made it: nobody can find a plan for as many ranks and slots that is better
    than the bound on these tokens; or, of span and messages, none that is as balanced. Ctrl-C ends
    the proofs early, with what is proven by then.

    Example: placer certify plan.json trace --seconds 60
    """
    from placer.plan import read_plan
    from placer.planning import certify_plan, open_traces
    from placer.report.certificates import certificate_table
    from placer.report.console import progress_status, show, show_warnings

    plan = read_plan(plan_path)
    with progress_status() as progress:
        progress("reading the trace")
        source = open_traces([trace])[0]
        show_warnings(source.warnings)
        certificate = certify_plan(
            plan,
            source,
            seconds=seconds,
            figures=figure,
            phase=phase.value if phase else None,
            as_balanced=not any_imbalance,
            progress=progress,
        )
    document = {"plan": str(plan_path), "trace": str(trace), **certificate.to_document()}
    show(json_output, document, lambda: certificate_table(document))

"""`placer export`: a plan in an engine's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("export")(export)


def export(
    plan_path: options.PlanFile,
    engine_name: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ENGINE",
            help="vllm, sglang, tensorrt-llm, vllm-ascend, omni-infer, eplb, fastdeploy or "
            "rank-lists.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The engine's file.")],
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--num-layers",
            min=1,
            help="Hidden layers of the model, where the engine counts dense ones too. "
            "Default: up to the plan's last layer.",
        ),
    ] = None,
    fill_empty: Annotated[
        bool,
        typer.Option(
            "--fill-empty",
            help="Put further copies of experts into slots that the plan leaves empty.",
        ),
    ] = False,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Write a plan as an engine loads it (docs/engines/).

    What the engine cannot hold is refused, with what would mend it.

    Example: placer export plan.json --to sglang -o expert-location.json
    """
    from rich.markup import escape

    from placer.engines.registry import ExportOptions, engine_named
    from placer.files import check_output_file
    from placer.plan import read_plan
    from placer.report.console import show

    engine = engine_named(engine_name)
    plan_format = engine.format_to_write(output)
    check_output_file(output, force)
    plan = read_plan(plan_path)
    notes = plan_format.write(plan, output, ExportOptions(num_layers, fill_empty, force))
    document = {
        "path": str(output),
        "engine": engine.name,
        "kind": plan_format.title,
        "notes": notes,
    }
    show(
        json_output,
        document,
        lambda: [
            f"[bold]{escape(str(output))}[/]: {plan_format.title} ({engine.about})",
            *(f"  {escape(note)}" for note in notes),
        ],
    )

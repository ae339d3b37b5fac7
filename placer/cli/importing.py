"""`placer import`: make a trace or a plan of what another program wrote."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli import options
from placer.wording import counted

if TYPE_CHECKING:
    from placer.engines.importing import ImportedRecords
    from placer.engines.registry import PlanFormat, PlanHints


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("import")(import_)


def import_(
    file: Annotated[Path, typer.Argument(metavar="PATH", help="The file or folder that it wrote.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder of the new trace; a file for a plan, or where only load was recorded.",
        ),
    ],
    source_format: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="npz, sglang, routed-experts, vllm-load, tensorrt-llm, vllm-ascend, omni-infer, "
            "matrix, table; plans also vllm, eplb, fastdeploy, rank-lists.",
        ),
    ] = "npz",
    num_experts: Annotated[
        int | None,
        typer.Option("--num-experts", min=1, help="Experts per layer, where PATH does not say."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Experts per token, where PATH does not say."),
    ] = None,
    layer_ids: Annotated[
        str | None,
        typer.Option(
            "--layer-ids",
            metavar="3-60",
            help="Real numbers of the MoE layers, like 1-26 or 0,2,4.",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Of a plan: its ranks, where PATH does not say."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Of a plan: hosts of its ranks. Default: one."),
    ] = None,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Make a trace of what another program recorded, or a plan of its placement (docs/engines/).

    Where tokens were recorded, a trace; where only load was, a load record, which solves for
    balance alone. A file that an engine loads its placement from becomes a plan.

    Example: placer import recorder/ --from sglang -o trace
    """
    from placer.engines.importing import plan_format_of
    from placer.errors import UsageError

    plan_format = plan_format_of(source_format, file)
    if plan_format is not None:
        from placer.engines.registry import PlanHints

        plan_hints = PlanHints(gpus, nodes, num_experts, parse_layer_ids(layer_ids))
        import_plan(file, output, plan_format, plan_hints, force, json_output)
        return
    if (gpus or nodes) and file.exists():
        raise UsageError(f"--gpus and --nodes are for plans, and {file} is none", "leave them out")
    from placer.engines.importing import import_records
    from placer.engines.records import Hints
    from placer.report.console import progress_status, show, show_warnings

    hints = Hints(num_experts=num_experts, top_k=top_k, layer_ids=parse_layer_ids(layer_ids))
    with progress_status() as progress:
        progress(f"importing {file}")
        imported = import_records(
            file, output, record_format=source_format, hints=hints, force=force
        )
    show_warnings(imported.warnings)
    document = summary_of(imported)
    show(json_output, document, lambda: [summary_line(document)])


def import_plan(
    file: Path,
    output: Path,
    plan_format: PlanFormat,
    hints: PlanHints,
    force: bool,
    json_output: bool,
) -> None:
    """Write an engine's placement as a plan of placer's."""
    from placer.errors import UsageError
    from placer.files import check_output_file
    from placer.plan import write_plan
    from placer.report.console import show, show_warnings
    from placer.report.plans import plan_summary

    if output.suffix != ".json":
        raise UsageError(
            f"{file} is a {plan_format.title}, which becomes a plan, a .json file",
            f"-o {output.with_suffix('.json')}",
        )
    check_output_file(output, force)
    imported = plan_format.read(file, hints)
    write_plan(imported.plan, output, force=force)
    show_warnings(imported.warnings)
    document = {
        "kind": "plan",
        "path": str(output),
        "warnings": imported.warnings,
        **imported.plan.to_document(),
    }
    show(json_output, document, lambda: plan_summary(document))


def summary_of(imported: ImportedRecords) -> dict[str, Any]:
    """What was made, as a JSON document."""
    from placer.trace.load import LoadRecord

    content = imported.content
    shared = {
        "path": str(imported.path),
        "layers": content.num_layers,
        "experts": content.num_experts,
        "warnings": imported.warnings,
    }
    if isinstance(content, LoadRecord):
        return {
            "kind": "load",
            **shared,
            "windows": content.num_windows,
            "pairs": content.num_pairs,
        }
    return {
        "kind": "trace",
        **shared,
        "tokens": content.num_tokens,
        "requests": int(content.requests().size),
        "top_k": content.top_k,
        "has_weights": content.weights is not None,
    }


def summary_line(document: dict[str, Any]) -> str:
    """The same for people."""
    from rich.markup import escape

    from placer.trace.load import WHY_NO_AFFINITY

    path = f"[bold]{escape(document['path'])}[/]"
    size = f"{counted(document['layers'], 'layer')} x {document['experts']} experts"
    if document["kind"] == "load":
        return (
            f"{path}: load of {size} in {counted(document['windows'], 'window')}, "
            f"{counted(document['pairs'], 'token-expert pair')}; {WHY_NO_AFFINITY}"
        )
    return (
        f"{path}: {counted(document['tokens'], 'token')} of "
        f"{counted(document['requests'], 'request')}, {size}, top-{document['top_k']}"
    )


def parse_layer_ids(text: str | None) -> tuple[int, ...] | None:
    """ "3-5,7" as 3, 4, 5, 7.

    Raises:
        UsageError: not such a list, or not increasing.
    """
    from placer.errors import UsageError

    if text is None:
        return None
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--layer-ids {text!r} is no list of numbers", "like 3-60, or 0,2,4")
        ids += range(int(first), int(last if dash else first) + 1)
    if not ids or any(b <= a for a, b in pairwise(ids)):
        raise UsageError(f"--layer-ids {text!r} must name increasing layers", "like 3-60")
    return tuple(ids)

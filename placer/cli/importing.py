"""`placer import`: make a trace of what another program recorded."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


class SourceFormat(StrEnum):
    """Formats that placer reads."""

    npz = "npz"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("import")(import_)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the other program wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new trace.")],
    source_format: Annotated[
        SourceFormat, typer.Option("--from", help="Format of FILE.")
    ] = SourceFormat.npz,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Make a trace of what another program recorded.

    npz: the interchange trace (docs/traces.md): experts [tokens, layers, k], num_experts, ...
    """
    from rich.markup import escape

    from placer.report.console import progress_status, show, show_warnings
    from placer.trace import import_npz

    with progress_status() as progress:
        progress(f"importing {file}")
        summary = import_npz(file, output, force=force)
    show_warnings(summary.warnings)
    document = {
        "path": str(summary.path),
        "tokens": summary.tokens,
        "requests": summary.requests,
        "layers": summary.layers,
        "experts": summary.experts,
        "top_k": summary.top_k,
        "has_weights": summary.has_weights,
        "warnings": summary.warnings,
    }
    show(
        json_output,
        document,
        lambda: [
            f"[bold]{escape(str(summary.path))}[/]: {summary.tokens:,} tokens of "
            f"{summary.requests:,} requests, {summary.layers} layers x {summary.experts} experts, "
            f"top-{summary.top_k}"
        ],
    )

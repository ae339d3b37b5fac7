"""`placer analyze`: what is in the routing, and what a better placement could bring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("analyze")(analyze)


def analyze(
    trace: options.OneTrace,
    gpus: Annotated[
        list[int] | None,
        typer.Option("--gpus", min=1, help="Ranks to bound the gain for; may be repeated."),
    ] = None,
    phase: options.Phase = None,
    graphml: Annotated[
        Path | None, typer.Option("--graphml", help="Write the affinity graph (networkx) here.")
    ] = None,
    edges: Annotated[
        int, typer.Option("--edges", min=1, help="Likeliest edges of each node in the graph.")
    ] = 8,
    npz: Annotated[
        Path | None,
        typer.Option("--npz", help="Write load, co-activation and affinity here; they add up."),
    ] = None,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Load, co-activation and inter-layer affinity of a trace (docs/analysis.md)."""
    from placer.affinity import write_affinity
    from placer.affinity.analysis import analyse
    from placer.affinity.graph import write_graphml
    from placer.files import check_output_file
    from placer.planning import open_traces
    from placer.report.analysis import analysis_tables
    from placer.report.console import progress_status, show, show_warnings

    for path in (graphml, npz):
        if path is not None:
            check_output_file(path, force)
    with progress_status() as progress:
        progress("reading the trace")
        source = open_traces([trace])[0]
        show_warnings(source.warnings)
        if phase is not None:
            source = source.filtered(phase=phase.value)
        progress("counting")
        analysis = analyse(source)
        counts = analysis.overall
        ranks = gpus or [g for g in (4, 8, 16) if g <= counts.num_experts]
        document = {"path": str(trace), **analysis.summary(ranks)}
        if graphml is not None:
            progress(f"writing {graphml}")
            write_graphml(counts, graphml, top_n=edges, force=force)
        if npz is not None:
            progress(f"writing {npz}")
            write_affinity(counts, npz, force=force)
    show(json_output, document, lambda: analysis_tables(document))

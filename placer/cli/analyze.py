"""`placer analyze`: can a better placement help, and what is in the routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("analyze")(analyze)


def analyze(
    traces: options.Traces,
    gpus: Annotated[
        list[str] | None,
        typer.Option(
            "--gpus", metavar="N,N,...", help="Ranks to bound the gain for; may be repeated."
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also what takes solving: headroom, stale plans, a plan per phase, how much to "
            "profile. Ctrl-C keeps what was found.",
        ),
    ] = False,
    phase: options.Phase = None,
    nodes: options.Nodes = 1,
    slots_per_rank: options.SlotsPerRank = None,
    dispatch: options.Dispatch = options.DispatchName.alltoall,
    max_imbalance: options.MaxImbalance = None,
    seed: options.Seed = 0,
    time_limit: options.TimeLimit = None,
    holdout: options.Holdout = 0.5,
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
    """Say whether placement can help, and why (docs/analysis.md).

    With --deep, plans for the first --gpus are solved and judged on held-out requests; nodes,
    slots, dispatch, cap, seed, holdout and the time limit of each solve belong to these plans.

    Example: placer analyze trace --gpus 8 --deep
    """
    from placer.affinity import write_affinity
    from placer.affinity.analysis import analyse
    from placer.affinity.details import routing_details
    from placer.affinity.graph import write_graphml
    from placer.errors import UsageError
    from placer.files import check_output_file
    from placer.planning import Settings, open_traces
    from placer.report.analysis import analysis_tables
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.studies import deep_tables
    from placer.studies.deep import deep_analysis
    from placer.studies.verdict import verdict
    from placer.trace.concat import concatenate

    asked = [count for text in gpus or [] for count in options.numbers("--gpus", text, 1)]
    for path in (graphml, npz):
        if path is not None:
            check_output_file(path, force)
    with progress_status() as progress:
        progress("reading the trace")
        sources = open_traces(traces)
        show_warnings([warning for source in sources for warning in source.warnings])
        source = concatenate(sources)
        if phase is not None:
            source = source.filtered(phase=phase.value)
        progress("counting")
        analysis = analyse(source)
        counts = analysis.overall
        ranks = asked or [g for g in (8, 4, 16) if g < counts.num_experts]
        if deep and not ranks:
            raise UsageError("--deep needs to know for how many ranks", "--gpus 2")
        document = {
            "path": str(traces[0]) if len(traces) == 1 else f"{len(traces)} traces",
            **analysis.summary(ranks),
            "routing": routing_details(source, ranks, progress),
        }
        if graphml is not None:
            progress(f"writing {graphml}")
            write_graphml(counts, graphml, top_n=edges, force=force)
        if npz is not None:
            progress(f"writing {npz}")
            write_affinity(counts, npz, force=force)
        if deep:
            settings = Settings(
                num_ranks=ranks[0],
                num_nodes=nodes,
                slots_per_rank=slots_per_rank,
                dispatch=dispatch.value,
                max_imbalance=options.parse_max_imbalance(max_imbalance, "traffic", "auto"),
                cap_is_default=max_imbalance is None,
                seed=seed,
                time_limit_s=time_limit,
                holdout=holdout,
            )
            document["deep"] = deep_analysis(source, settings, progress)
        document["verdict"] = verdict(document)
    show(
        json_output,
        document,
        lambda: [*analysis_tables(document), *(deep_tables(document["deep"]) if deep else [])],
    )

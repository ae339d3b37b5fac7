"""`placer sweep`: a plan for every combination of ranks, nodes, slots, dispatch and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from placer.cli import options
from placer.errors import UsageError
from placer.wording import among


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("sweep")(sweep)


def sweep(
    traces: options.Traces,
    gpus: Annotated[
        str, typer.Option("--gpus", metavar="N,N,...", help="Numbers of ranks, e.g. 4,8,16.")
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder of the sweep; one that was cut short goes on."),
    ],
    nodes: Annotated[
        str,
        typer.Option("--nodes", metavar="M,M,...", help="Numbers of hosts; others are left out."),
    ] = "1",
    spare_slots: Annotated[
        str,
        typer.Option(
            "--spare-slots",
            metavar="S,S,...",
            help="Slots per rank and layer beyond the fewest that hold every expert.",
        ),
    ] = "0",
    dispatch: Annotated[
        str, typer.Option("--dispatch", metavar="D,D,...", help="alltoall, coherent, allgather.")
    ] = "alltoall",
    clusters: Annotated[
        str,
        typer.Option(
            "--cluster", metavar="C,C,...", help="Presets or TOML files: step time is modelled."
        ),
    ] = "",
    model: options.ModelName = None,
    expert_groups: options.ExpertGroups = None,
    batch_tokens: Annotated[
        str,
        typer.Option(
            "--batch-tokens", metavar="B,B,...", help="Tokens of a batch, mixed from all requests."
        ),
    ] = "256",
    objective: options.Objective = options.ObjectiveName.traffic,
    max_imbalance: options.MaxImbalance = None,
    phase: options.Phase = None,
    solver: options.SolverName = "auto",
    seed: options.Seed = 0,
    time_limit: options.TimeLimit = None,
    holdout: options.Holdout = 0.5,
    replica_policy: options.ReplicaPolicy = options.ReplicaPolicyName.local,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Plans at once. Default: one for each core."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Make them on a Ray cluster; local = here."),
    ] = None,
    json_output: options.JsonOutput = False,
) -> None:
    """Solve and judge a plan for every combination (docs/sweep.md).

    The folder gets results.csv and sweep.svg. Run the same command again after Ctrl-C, or with
    more values: only missing plans are made.

    Example: placer sweep trace --gpus 4,8,16 --spare-slots 0,1 -o sweep
    """
    from placer.files import atomic_path
    from placer.planning import Settings, check_solver, open_traces
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.sweep import sweep_csv, sweep_table
    from placer.report.sweep_plots import sweep_svg
    from placer.sweep.grid import Grid
    from placer.sweep.running import run_sweep
    from placer.sweep.workers import in_processes, on_ray

    if ray is not None and jobs is not None:
        raise UsageError(
            "--jobs and --ray: the cluster says how many plans are made at once", "leave out --jobs"
        )
    names = [name.value for name in options.DispatchName]
    grid = Grid(
        num_ranks=options.numbers("--gpus", gpus, 1),
        num_nodes=options.numbers("--nodes", nodes, 1),
        spare_slots=options.numbers("--spare-slots", spare_slots, 0),
        dispatch=words("--dispatch", dispatch, names),  # type: ignore[arg-type]
        clusters=words("--cluster", clusters),
        batch_tokens=options.numbers("--batch-tokens", batch_tokens, 1),
    )
    check_solver(solver)
    settings = Settings(
        num_ranks=grid.num_ranks[0],
        objective=objective.value,
        max_imbalance=options.parse_max_imbalance(max_imbalance, objective.value, solver),
        cap_is_default=max_imbalance is None,
        phase=phase.value if phase else None,
        solver=solver,
        seed=seed,
        time_limit_s=time_limit,
        holdout=holdout,
        model=model,
        expert_groups=expert_groups,
        replica_policy=replica_policy.value,
    )
    execute = in_processes(jobs or _cores()) if ray is None else on_ray(ray)
    with progress_status() as progress:
        progress("reading the trace")
        sources = open_traces(traces)
        show_warnings([warning for source in sources for warning in source.warnings])
        document = run_sweep(sources, settings, grid, output, execute, progress)
        files: dict[str, str | None] = {"results.csv": sweep_csv(document)}
        if any(cell["result"] for cell in document["cells"]):
            progress("drawing")
            files["sweep.svg"] = sweep_svg(document)
        for name, text in files.items():
            if text is not None:
                with atomic_path(output / name, force=True) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    show(json_output, document, lambda: [*sweep_table(document), *_where(output, files)])


def words(option: str, text: str, known: list[str] | None = None) -> tuple[str, ...]:
    """Words, separated by commas."""
    found = tuple(part.strip() for part in text.split(","))
    unknown = [word for word in found if known is not None and word not in known]
    if unknown:
        raise UsageError(f"{option} knows no {unknown[0]!r}", among(unknown[0], known or []))
    return found


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _where(output: Path, files: dict[str, Any]) -> list[str]:
    from rich.markup import escape

    return [escape(f"written: {', '.join(str(output / name) for name in files)}")]

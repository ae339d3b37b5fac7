"""`placer bench`: measure a plan in the runtime against baselines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli import on_ranks, options

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.plan import Dispatch, Plan
    from placer.runtime.bench.job import Arm


class WayName(StrEnum):
    """How tokens travel; `alltoall` with or without one copy per other node."""

    alltoall = "alltoall"
    by_node = "alltoall-by-node"
    coherent = "coherent"
    allgather = "allgather"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("bench")(bench)


def bench(
    plan_path: options.PlanFile,
    model: on_ranks.ModelFolder,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="contiguous, another plan file, or a solver's name (eplb, ...; needs --trace); "
            "may be repeated. Default: contiguous.",
        ),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            "--trace",
            help="What the plan was made from: baselines that solve fit the same requests.",
        ),
    ] = None,
    prompts: on_ranks.PromptFiles = None,
    prompt: on_ranks.PromptTexts = None,
    dispatch: Annotated[
        list[WayName] | None,
        typer.Option(
            "--dispatch",
            help="How tokens travel under every placement; repeated, each runs in every way. "
            "Default: plans as they were made for, other baselines as the plan.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of each prompt; none ends earlier.")
    ] = 32,
    batch_size: on_ranks.BatchSize = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of every placement.")] = 5,
    warm_ups: Annotated[
        int, typer.Option("--warm-ups", min=1, help="Runs of every placement that do not count.")
    ] = 1,
    cluster: options.ClusterName = None,
    dtype: on_ranks.Dtype = "auto",
    device: on_ranks.Device = "auto",
    timeout: on_ranks.Timeout = 120.0,
    port: on_ranks.MasterPort = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder that keeps each repeat; a bench cut off goes on from it."
        ),
    ] = None,
    json_output: options.JsonOutput = False,
) -> None:
    """Run the same requests under a plan and its baselines, in turn, and compare.

    Measured: tokens per second, times of dispatch, compute and combine, bytes and messages by
    link, load of ranks. Beside it what the replay and, with --cluster, the cost model say of the
    same tokens, and how far off they are. Local processes, or one rank of several under torchrun.

    Example: placer bench plan.json --model examples/model --prompts examples/prompts/c.jsonl
    """
    from placer.plan import read_plan
    from placer.report.benching import bench_lines
    from placer.report.console import show
    from placer.runtime import check_installed

    check_installed()
    from placer.runtime.bench.job import BenchJob
    from placer.runtime.bench.running import bench_on_rank
    from placer.timing import cluster_for

    plan = read_plan(plan_path)
    job = BenchJob(
        plan=plan,
        plan_name=str(plan_path),
        arms=_arms(plan, baseline or ["contiguous"], trace or [], dispatch or []),
        folder=model,
        prompts=on_ranks.prompts_of(prompts, prompt),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        warm_ups=warm_ups,
        cluster=None if cluster is None else cluster_for(cluster, plan.placement),
        dtype=dtype,
        device=device,
        output=output,
    )
    doing = f"run {len(job.arms)} placements and ways in turn"
    document = on_ranks.run_on_ranks(bench_on_rank, job, plan.placement, timeout, port, doing)
    if document is not None:  # else another rank than the first, under torchrun
        show(json_output, document, lambda: bench_lines(document))


def _arms(
    plan: Plan, baselines: list[str], traces: list[Path], dispatch: list[WayName]
) -> tuple[Arm, ...]:
    """The plan and its baselines, each in every way that was asked for, or in its own."""
    from placer.runtime.bench.job import Arm, Way

    known = {
        WayName.alltoall: Way("alltoall"),
        WayName.by_node: Way("alltoall", deduplicate_nodes=True),
        WayName.coherent: Way("coherent"),
        WayName.allgather: Way("allgather"),
    }
    ways = [known[name] for name in dispatch]
    placed = [("plan", plan.placement, plan.dispatch)]
    placed += [(name, *found) for name, found in _baselines(plan, baselines, traces)]
    return tuple(
        Arm(name if i == 0 else f"{name} ({way.name})", placement, way)
        for name, placement, own in placed
        for i, way in enumerate(ways or [Way(own)])
    )


def _baselines(
    plan: Plan, names: list[str], traces: list[Path]
) -> list[tuple[str, tuple[Placement, Dispatch]]]:
    """Name, placement and own dispatch model of each."""
    import solvers
    from placer.baselines import baseline_placement
    from placer.errors import UsageError
    from placer.plan import read_plan
    from placer.planning import open_traces
    from placer.planning.baselines import solved_baseline

    found: list[tuple[str, tuple[Placement, Dispatch]]] = []
    sources = open_traces(traces) if traces else []
    for name in names:
        is_file = Path(name).is_file()
        if name == "contiguous" or is_file or name not in solvers.names():
            placement = baseline_placement(name, plan)
            own = read_plan(Path(name)).dispatch if is_file else plan.dispatch
            found.append((name, (placement, own)))
            continue
        if not sources:
            raise UsageError(
                f"baseline {name} must be solved, and there is no trace to solve it from",
                "--trace DIR, the one that the plan was made from",
            )
        found.append((name, (solved_baseline(name, plan, sources), plan.dispatch)))
    return found

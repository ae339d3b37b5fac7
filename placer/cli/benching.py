"""`placer bench`: measure a plan in the runtime against baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli import options

if TYPE_CHECKING:
    from placer.plan import Plan
    from placer.runtime.bench.job import Arm, BenchJob


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("bench")(bench)


def bench(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of a Hugging Face checkpoint.")],
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
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts", help=".txt: a prompt a line; .jsonl: {prompt, label}; repeat it."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")
    ] = None,
    dispatch: Annotated[
        options.DispatchName | None,
        typer.Option("--dispatch", help="How tokens travel, instead of the plan's own."),
    ] = None,
    deduplicate_nodes: Annotated[
        bool,
        typer.Option(
            "--deduplicate-nodes", help="alltoall: one copy of a token per other node, passed on."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of each prompt; none ends earlier.")
    ] = 32,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that run together.")
    ] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of every placement.")] = 5,
    warm_ups: Annotated[
        int, typer.Option("--warm-ups", min=1, help="Runs of every placement that do not count.")
    ] = 1,
    cluster: options.ClusterName = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=1, help="Seconds that a rank waits for another one."),
    ] = 120.0,
    port: Annotated[
        int,
        typer.Option("--master-port", min=0, max=65535, help="Ranks meet here; 0 = a free port."),
    ] = 0,
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
    from placer.timing import cluster_for
    from placer.tracer.prompts import Prompt, read_prompts

    plan = read_plan(plan_path)
    asked = [one for path in prompts or [] for one in read_prompts(path)]
    asked += [Prompt(text) for text in prompt or []]
    job = BenchJob(
        plan=plan,
        plan_name=str(plan_path),
        arms=_arms(plan, baseline or ["contiguous"], trace or []),
        folder=model,
        dispatch=dispatch.value if dispatch else plan.dispatch,
        deduplicate_nodes=deduplicate_nodes,
        prompts=tuple(asked),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        warm_ups=warm_ups,
        cluster=None if cluster is None else cluster_for(cluster, plan.placement),
        dtype=dtype,
        device=device,
        output=output,
    )
    document = _run(job, timeout, port)
    if document is not None:  # else another rank than the first, under torchrun
        show(json_output, document, lambda: bench_lines(document))


def _arms(plan: Plan, baselines: list[str], traces: list[Path]) -> tuple[Arm, ...]:
    import solvers
    from placer.baselines import baseline_placement
    from placer.errors import UsageError
    from placer.planning import open_traces
    from placer.planning.baselines import solved_baseline
    from placer.runtime.bench.job import Arm

    arms = [Arm("plan", plan.placement)]
    sources = open_traces(traces) if traces else []
    for name in baselines:
        if name == "contiguous" or Path(name).is_file() or name not in solvers.names():
            arms.append(Arm(name, baseline_placement(name, plan)))
            continue
        if not sources:
            raise UsageError(
                f"baseline {name} must be solved, and there is no trace to solve it from",
                "--trace DIR, the one that the plan was made from",
            )
        arms.append(Arm(name, solved_baseline(name, plan, sources)))
    return tuple(arms)


def _run(job: BenchJob, timeout: float, port: int) -> dict[str, Any] | None:
    from placer.report.console import progress_status
    from placer.runtime.bench.running import bench_on_rank
    from placer.runtime.context import context_from_environment, is_launched
    from placer.runtime.launch import launch

    placement = job.plan.placement
    if is_launched():
        context = context_from_environment(placement.ranks_per_node, timeout_s=timeout)
        return bench_on_rank(context, job)
    with progress_status() as progress:
        progress(f"{placement.num_ranks} ranks run {len(job.arms)} placements in turn")
        results = launch(
            bench_on_rank,
            placement.num_ranks,
            (job,),
            ranks_per_node=placement.ranks_per_node,
            timeout_s=timeout,
            port=port,
        )
    return results[0]

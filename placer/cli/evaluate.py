"""`placer evaluate`: replay a trace under a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placer.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("evaluate")(evaluate)


def evaluate(
    plan_path: options.PlanFile,
    trace: options.OneTrace,
    baseline: options.Baselines = None,
    all_requests: options.AllRequests = False,
    phase: options.Phase = None,
    dispatch: Annotated[
        options.DispatchName | None,
        typer.Option("--dispatch", help="Instead of the plan's own."),
    ] = None,
    replica_policy: Annotated[
        options.ReplicaPolicyName | None,
        typer.Option("--replica-policy", help="Instead of the plan's own."),
    ] = None,
    batch_tokens: options.BatchTokens = 256,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of the bootstrap; default: the plan's.")
    ] = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=0, help="Of the bootstrap; 0 = no intervals.")
    ] = 1000,
    cluster: options.ClusterName = None,
    model: options.ModelName = None,
    tokens_per_rank: Annotated[
        int | None,
        typer.Option(
            "--tokens-per-rank",
            min=1,
            help="With --cluster: batches of so many tokens of every home rank.",
        ),
    ] = None,
    micro_batches: Annotated[
        int,
        typer.Option(
            "--micro-batches",
            min=1,
            help="With --cluster: parts of a batch of which one communicates while another "
            "computes.",
        ),
    ] = 1,
    deduplicate_nodes: Annotated[
        bool,
        typer.Option(
            "--deduplicate-nodes", help="With --cluster: one copy of a token per remote node."
        ),
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show every figure.")] = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Judge a plan on a trace, beside baselines on the same tokens.

    Of a trace that the plan was fitted to, only the held-out requests count, and only the phase
    that it was fitted to, unless --phase names another. With --cluster the step time is modelled as
    well: its distribution over batches, what it is spent on, which rank and link is waited for.
    """
    from placer.baselines import baseline_placement
    from placer.errors import UsageError
    from placer.evaluation import evaluate as judge
    from placer.plan import read_plan
    from placer.planning import judging_part, open_traces
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.tables import evaluation_table
    from placer.report.timing import timing_table
    from placer.timing import TimingOptions, step_times

    if cluster is None and (model or tokens_per_rank or micro_batches > 1 or deduplicate_nodes):
        raise UsageError(
            "--model, --tokens-per-rank, --micro-batches and --deduplicate-nodes model a step "
            "time, which needs a cluster",
            "--cluster h100-nvl8",
        )
    plan = read_plan(plan_path)
    baselines = {name: baseline_placement(name, plan) for name in baseline or ["contiguous"]}
    with progress_status() as progress:
        progress("reading the trace")
        source = open_traces([trace])[0]
        show_warnings(source.warnings)
        part, scope = judging_part(
            source,
            plan,
            phase=phase.value if phase else None,
            all_requests=all_requests,
        )
        progress("replaying")
        evaluation = judge(
            plan.placement,
            baselines,
            part,
            scope=scope,
            dispatch=(dispatch or options.DispatchName(plan.dispatch)).value,
            replica_policy=(replica_policy or plan_replica_policy(plan)).value,
            batch_tokens=batch_tokens,
            seed=int(plan.provenance.get("seed", 0)) if seed is None else seed,
            num_resamples=resamples,
        )
        document = evaluation.to_document()
        if cluster is not None:
            progress("modelling step times")
            document["step_time"] = step_times(
                {"plan": plan.placement, **baselines},
                part,
                TimingOptions(
                    cluster=cluster,
                    model=model,
                    batch_tokens=batch_tokens,
                    tokens_per_rank=tokens_per_rank,
                    micro_batches=micro_batches,
                    deduplicate_nodes=deduplicate_nodes,
                ),
                dispatch=evaluation.dispatch,
                replica_policy=evaluation.replica_policy,
            )

    def render() -> list[RenderableType]:
        lines = list(evaluation_table(document, show_all))
        return [*lines, *(timing_table(document["step_time"]) if cluster is not None else [])]

    show(json_output, document, render)


def plan_replica_policy(plan: Plan) -> options.ReplicaPolicyName:
    """The policy that the plan was judged with when it was made."""
    found = plan.provenance.get("settings", {}).get("replica_policy")
    known = found in [name.value for name in options.ReplicaPolicyName]
    return options.ReplicaPolicyName(found) if known else options.ReplicaPolicyName.local

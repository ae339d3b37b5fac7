"""`placer compare`: solvers side by side on the same held-out tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("compare")(compare)


def compare(
    traces: options.Traces,
    gpus: options.Gpus,
    solvers: Annotated[
        str, typer.Option("--solvers", help="Names, separated by commas; all = every solver.")
    ] = "all",
    nodes: options.Nodes = 1,
    slots_per_rank: options.SlotsPerRank = None,
    dispatch: options.Dispatch = options.DispatchName.alltoall,
    objective: options.Objective = options.ObjectiveName.traffic,
    max_imbalance: options.MaxImbalance = None,
    balance_over: options.BalanceOver = None,
    phase: options.Phase = None,
    seed: options.Seed = 0,
    time_limit: options.TimeLimit = None,
    holdout: options.Holdout = 0.5,
    in_sample: options.InSample = False,
    node_weight: options.NodeWeight = None,
    cluster: options.ClusterName = None,
    model: options.ModelName = None,
    expert_groups: options.ExpertGroups = None,
    kv_tokens: options.KvTokens = 0,
    reserve: options.Reserve = 0.1,
    replica_policy: options.ReplicaPolicy = options.ReplicaPolicyName.local,
    json_output: options.JsonOutput = False,
) -> None:
    """Compare solvers: each fits the same requests and is judged on the others.

    The cap on imbalance binds the solvers that can keep one. Bold: no other solver is better in
    both messages and imbalance. With --cluster memory is checked and step times are modelled.

    Example: placer compare trace --gpus 8 --solvers contiguous,eplb,local_search
    """
    from placer.comparison import compare_solvers
    from placer.planning import Settings, open_traces
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.tables import comparison_table
    from placer.report.timing import timing_table

    options.refuse_kv_of_no_model(model, kv_tokens)
    settings = Settings(
        num_ranks=gpus,
        num_nodes=nodes,
        slots_per_rank=slots_per_rank,
        dispatch=dispatch.value,
        objective=objective.value,
        max_imbalance=options.parse_max_imbalance(max_imbalance, objective.value, "auto"),
        cap_is_default=max_imbalance is None,
        balance_over=balance_over.value if balance_over else None,
        phase=phase.value if phase else None,
        seed=seed,
        time_limit_s=time_limit,
        holdout=holdout,
        in_sample=in_sample,
        node_weight=node_weight,
        cluster=cluster,
        model=model,
        expert_groups=expert_groups,
        kv_tokens=kv_tokens,
        reserve=reserve,
        replica_policy=replica_policy.value,
    )
    with progress_status() as progress:
        sources = open_traces(traces)
        show_warnings([warning for source in sources for warning in source.warnings])
        names = None if solvers == "all" else [name.strip() for name in solvers.split(",")]
        document = compare_solvers(sources, settings, names, progress)

    def render() -> list[RenderableType]:
        times = timing_table(document["step_time"]) if "step_time" in document else []
        return [*comparison_table(document), *times]

    show(json_output, document, render)

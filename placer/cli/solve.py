"""`placer solve`: traces in, a plan file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("solve")(solve)


def solve(
    traces: options.Traces,
    gpus: options.Gpus,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan file to write.")],
    nodes: options.Nodes = 1,
    slots_per_rank: options.SlotsPerRank = None,
    dispatch: options.Dispatch = options.DispatchName.alltoall,
    objective: options.Objective = options.ObjectiveName.traffic,
    max_imbalance: options.MaxImbalance = None,
    balance_over: options.BalanceOver = None,
    robust: options.Robust = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="The frontier between messages and imbalance: a table, and beside the plan (its "
            "knee) a folder with every point's plan, a file and a picture.",
        ),
    ] = False,
    slot_budget: options.SlotBudget = None,
    pin: options.Pins = None,
    start: options.Start = None,
    max_moves: options.MaxMoves = None,
    phase: options.Phase = None,
    solver: options.SolverName = "auto",
    seed: options.Seed = 0,
    time_limit: options.TimeLimit = None,
    certify: options.Certify = None,
    holdout: options.Holdout = 0.5,
    in_sample: options.InSample = False,
    node_weight: options.NodeWeight = None,
    cluster: options.ClusterName = None,
    model: options.ModelName = None,
    expert_groups: options.ExpertGroups = None,
    kv_tokens: options.KvTokens = 0,
    reserve: options.Reserve = 0.1,
    replica_policy: options.ReplicaPolicy = options.ReplicaPolicyName.local,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Solve for a placement and write it as a plan.

    The plan is fitted to one part of the requests; what it promises is measured on the others.

    Example: placer solve trace --gpus 8 --max-imbalance 1.10 -o plan.json
    """
    from placer.errors import UsageError
    from placer.files import check_output_file, check_output_folder
    from placer.load_planning import only_load, plan_from_load
    from placer.plan import write_plan
    from placer.planning import (
        CAPPED_SOLVERS,
        Settings,
        cap_warnings,
        make_frontier,
        make_plan,
        open_traces,
    )
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.frontier import frontier_folder, frontier_table, write_frontier
    from placer.report.plans import plan_summary
    from placer.trace.load import is_load

    check_output_file(output, force)
    if pareto:
        check_output_folder(frontier_folder(output), force)
        if max_imbalance is not None:
            raise UsageError("--pareto goes through all caps", "leave out --max-imbalance")
        if objective is not options.ObjectiveName.traffic or solver not in CAPPED_SOLVERS:
            raise UsageError(
                "--pareto trades messages for balance by placer's own search",
                "leave out --objective and --solver",
            )
        if certify is not None:
            raise UsageError("--pareto proves no bounds", "placer certify, on one of its plans")
        if any(is_load(path) for path in traces):
            raise UsageError(
                "a load record has no messages to trade for balance", "leave out --pareto"
            )
    options.refuse_kv_of_no_model(model, kv_tokens)
    settings = Settings(
        num_ranks=gpus,
        num_nodes=nodes,
        slots_per_rank=slots_per_rank,
        dispatch=dispatch.value,
        objective=objective.value,
        max_imbalance=options.parse_max_imbalance(max_imbalance, objective.value, solver),
        cap_is_default=max_imbalance is None,
        balance_over=balance_over.value if balance_over else None,
        robust=robust.value if robust else None,
        slot_budget=slot_budget,
        pins=tuple(pin or ()),
        start=None if start is None else str(start),
        max_moves=max_moves,
        phase=phase.value if phase else None,
        solver=solver,
        seed=seed,
        time_limit_s=time_limit,
        certify_s=certify,
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
        if any(is_load(path) for path in traces):
            plan = plan_from_load(only_load(traces), settings, progress, name=traces[0].name)
        else:
            sources = open_traces(traces)
            show_warnings([warning for source in sources for warning in source.warnings])
            if pareto:
                frontier = make_frontier(sources, settings, progress)
                plan = frontier.knee.plan
            else:
                plan = make_plan(sources, settings, progress)
    if not pareto:
        show_warnings(cap_warnings(plan, settings))
    write_plan(plan, output, force=force)
    document = {"path": str(output), **plan.to_document()}
    if not pareto:
        show(json_output, document, lambda: plan_summary(document))
        return
    folder = write_frontier(frontier, output, force=force)
    points = {"path": str(folder), **frontier.to_document()}
    show(json_output, points, lambda: [*plan_summary(document), *frontier_table(points)])

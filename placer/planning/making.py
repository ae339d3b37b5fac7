"""From traces to a plan: split, count, solve, judge on the tokens that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from placer import __version__
from placer.errors import InfeasibleError, PlacerError, TimeLimitError, UsageError
from placer.evaluation import evaluate
from placer.placement import Placement, contiguous_like
from placer.plan import Plan
from placer.planning.certifying import (
    PROOF_SHARE,
    bounds_of_result,
    figure_of_objective,
    with_bounds,
)
from placer.planning.parts import Parts, split_sources
from placer.planning.posing import build_problem
from placer.planning.scenarios import workloads_of
from placer.planning.settings import Progress, Settings
from placer.planning.stopwatch import Stopwatch
from placer.timing import TimingOptions, dims_for, step_times
from placer.trace.source import TraceSource

if TYPE_CHECKING:
    from solvers import Budget, Problem, Result
    from solvers.bounds.bound import Bound

CAP_SLACK = 0.02  # of imbalance on unseen requests, that is not worth a warning


def check_solver(name: str) -> None:
    """Raise UsageError when no solver is called `name`."""
    import solvers

    try:
        solvers.get(name)
    except solvers.RequestError as error:
        what, _, known = str(error).partition("; ")
        raise UsageError(what, known) from None


def run_solver(problem: Problem, settings: Settings, budget: Budget | None = None) -> Result:
    """Solve; the solvers' errors become placer's.

    Raises:
        InfeasibleError, TimeLimitError, UsageError: from the solver. Any other error of it is a
            defect, and passes.
        KeyboardInterrupt: Ctrl-C before there was a placement.
    """
    import solvers

    budget = budget or solvers.Budget(settings.time_limit_s)
    try:
        return solvers.solve(problem, settings.solver, seed=settings.seed, budget=budget)
    except solvers.InfeasibleProblem as error:
        raise InfeasibleError(str(error)) from error
    except solvers.NoSolutionFound as error:
        if budget.interrupted:
            raise KeyboardInterrupt from error
        raise TimeLimitError(str(error), "give a longer --time-limit") from error
    except solvers.RequestError as error:
        what, _, hint = str(error).partition("; ")
        raise UsageError(what, hint) from error


def refuse_broken_cap(result: Result, settings: Settings) -> None:
    """Raise what a result that breaks the cap on imbalance means, if it does.

    A cap that nobody asked for refuses nothing.
    """
    import solvers

    if result.status != "infeasible" or settings.cap_is_default:
        return
    found = (
        f"imbalance at most {settings.max_imbalance}; the least that {settings.solver} found is "
        f"{solvers.capped_imbalance(result.parts):.4f}"
    )
    looser = "a higher --max-imbalance (none lifts it), or another slot per rank for replicas"
    if result.termination == "time_limit":
        raise TimeLimitError(
            f"the time limit passed before there was a placement with {found}",
            f"a longer --time-limit, {looser}",
        )
    if result.termination == "interrupted":
        raise PlacerError(f"interrupted before there was a placement with {found}")
    raise InfeasibleError(f"no placement was found with {found}", looser)


def cap_warnings(plan: Plan, settings: Settings) -> list[str]:
    """That the cap which nobody asked for could not be kept, or that unseen requests break one."""
    import solvers

    cap, reached = settings.max_imbalance, solvers.capped_imbalance(plan.certificate["parts"])
    if cap is None:
        return []
    if reached <= cap or not settings.cap_is_default:
        unseen = plan.prediction["metrics"]["imbalance"]["value"]
        held_out = plan.prediction["scope"] == "held-out"
        if not held_out or unseen is None or unseen <= cap + CAP_SLACK:
            return []
        return [
            f"the cap on imbalance, {cap:.2f}, is kept on the requests that the plan was fitted "
            f"to; unseen ones have {unseen:.3f} (fit to more requests, or ask for less)"
        ]
    when, way_out = "", "--slots-per-rank for replicas brings it down"
    if settings.max_moves is not None:
        way_out = f"{settings.max_moves} moves are too few: a higher --max-moves"
    if plan.certificate["termination"] == "time_limit":
        when, way_out = " within the time limit", "give a longer --time-limit"
    elif plan.certificate["termination"] == "interrupted":
        when, way_out = " before Ctrl-C", "let the search go on for longer"
    return [
        f"the default cap on imbalance, {cap:.2f}, could not be kept{when}: this plan has "
        f"{reached:.3f} on the tokens it was fitted to ({way_out})"
    ]


def make_plan(
    sources: Sequence[TraceSource], settings: Settings, progress: Progress = lambda _: None
) -> Plan:
    """Fit a plan to one part of the requests and predict its figures on the other.

    Once the search has begun, the first Ctrl-C ends it and what proofs are under way; the best plan
    so far is judged and returned.

    Raises:
        InfeasibleError: the cap on imbalance cannot be kept; nothing is returned.
        TimeLimitError: no placement that keeps it within the time limit.
    """
    import solvers

    watch = Stopwatch()
    check_solver(settings.solver)
    progress("splitting the requests")
    parts = split_sources(sources, settings)
    problem = build_problem(parts.fit, settings, progress)
    progress(f"solving with {settings.solver}")
    budget = solvers.Budget(settings.time_limit_s)
    proves = settings.certify_s is None and figure_of_objective(problem) is not None
    with solvers.ctrl_c_stops(budget):
        share = 1 - PROOF_SHARE if proves else 1.0
        result = run_solver(problem, settings, budget.part(share))
        refuse_broken_cap(result, settings)
        bounds = bounds_of_result(problem, result, settings, budget, progress)
        progress(f"replaying the {parts.scope} tokens")
        return plan_of_result(result, problem, parts, settings, watch, bounds)


def placement_of(problem: Problem, result: Result) -> Placement:
    """The result's table as a `Placement`."""
    return Placement(
        result.placement, problem.num_experts, problem.num_ranks, problem.ranks_per_node
    )


def certificate_of(result: Result, objective: str) -> dict[str, Any]:
    """What a plan says of its objective, on the tokens or loads that it was fitted to.

    A result that breaks only a cap that nobody asked for is feasible.
    """
    return {
        "scope": "fit",
        "objective": objective,
        "value": result.objective,
        "bound_of": result.bound_of,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "status": "feasible" if result.status == "infeasible" else result.status,
        "termination": result.termination,
        "parts": result.parts,
    }


def plan_of_result(
    result: Result,
    problem: Problem,
    parts: Parts,
    settings: Settings,
    watch: Stopwatch,
    bounds: Sequence[Bound] = (),
) -> Plan:
    """Judge the result on the parts' tokens and write down where it came from.

    A result that breaks only the default cap is feasible: nobody asked for the cap. `watch` has run
    since the work began.
    """
    placement = placement_of(problem, result)
    baseline = contiguous_like(placement)
    evaluation = evaluate(
        placement,
        {"contiguous": baseline},
        parts.judge,
        scope=parts.scope,
        dispatch=settings.dispatch,
        replica_policy=settings.replica_policy,
        seed=settings.seed,
    )
    asked = asdict(settings) | {"expert_groups": problem.num_groups}
    return Plan(
        placement=placement,
        layer_ids=tuple(int(i) for i in np.unique(parts.fit.layer_ids)),
        model=dims_for(settings.model, parts.fit)[0],
        dispatch=settings.dispatch,
        prediction=evaluation.to_document()
        | modelled_step_times({"plan": placement, "contiguous": baseline}, parts, settings)
        | by_workload(placement, baseline, parts, settings),
        certificate=with_bounds(
            certificate_of(result, settings.objective),
            bounds,
            problem,
        ),
        provenance={
            "inputs": parts.inputs,
            "split": {
                "by": "request",
                "holdout": settings.holdout,
                "seed": settings.seed,
                "in_sample": settings.in_sample,
            },
            "solver": result.solver,
            "seed": settings.seed,
            "settings": asked,
            "notes": result.notes,
            "versions": versions(),
        },
        timings={
            "solve_s": round(result.seconds, 3),
            **({"certify_s": round(sum(bound.seconds for bound in bounds), 3)} if bounds else {}),
            **watch.timings(),
        },
    )


def modelled_step_times(
    placements: Mapping[str, Placement],
    parts: Parts,
    settings: Settings,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Modelled step time of each placement by its name; nothing without a cluster."""
    if settings.cluster is None:
        return {}
    progress("modelling step times")
    options = TimingOptions(cluster=settings.cluster, model=settings.model)
    return {
        "step_time": step_times(
            placements,
            parts.judge,
            options,
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
        )
    }


def figures_of_interest(settings: Settings) -> tuple[str, ...]:
    """Names of the figures that a plan with these settings is about."""
    kind = "coherent" if settings.dispatch == "coherent" else "alltoall"
    nodes = (f"node_messages_{kind}",) if settings.num_nodes > 1 else ()
    return (f"messages_{kind}", *nodes, "imbalance", "imbalance_batches_mean")


def by_workload(
    placement: Placement, baseline: Placement, parts: Parts, settings: Settings
) -> dict[str, Any]:
    """How the plan and the baseline do on each workload; nothing unless they were asked for."""
    if settings.robust is None and settings.averaged_over != "workloads":
        return {}
    names, workload = workloads_of(parts.judge)
    requests = parts.judge.request_ids()
    figures = figures_of_interest(settings)
    rows = {}
    for number, name in enumerate(names):
        evaluation = evaluate(
            placement,
            {"contiguous": baseline},
            parts.judge.filtered(requests=requests[workload == number]),
            scope=parts.scope,
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
            seed=settings.seed,
        )
        rows[name] = {
            "requests": evaluation.requests,
            "tokens": evaluation.tokens,
            "metrics": {key: evaluation.metrics[key] for key in figures},
            "contiguous": {key: evaluation.baselines["contiguous"][key] for key in figures},
        }
    return {"workloads": rows}


def versions() -> dict[str, str]:
    """Versions of what a plan's bytes may depend on."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("numpy", "numba", "scipy", "ortools")}
    return {"placer": __version__, **found}

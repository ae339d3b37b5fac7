"""Every solver on the same requests, judged on the same held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from placer.errors import PlacerError
from placer.evaluation import evaluate
from placer.placement import Placement, contiguous_like
from placer.planning import (
    CAPPED_SOLVERS,
    Progress,
    Settings,
    Stopwatch,
    bounds_of_results,
    build_problem,
    check_solver,
    modelled_step_times,
    placement_of,
    run_solver,
    split_sources,
)
from placer.trace.source import TraceSource

if TYPE_CHECKING:
    from solvers import Result

FORMAT = "placer.comparison"
SCHEMA_VERSION = 1


def compare_solvers(
    sources: Sequence[TraceSource],
    settings: Settings,
    names: Sequence[str] | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Fit with each solver, judge all on the same tokens.

    Args:
        sources: traces of one model.
        settings: of all solvers; the cap on imbalance binds those in CAPPED_SOLVERS.
        names: solvers; None = all of them.
        progress: told what is being done.

    Returns:
        A document: what was judged, and a row per solver with its metrics, its change against
        contiguous, its gap and its seconds (without compiling, which `compile_s` has where it
        took long); a solver that failed has "error" instead. With a
        cluster "step_time" has the modelled step time of each.

    Raises:
        UsageError: an unknown name.
        PlacerError: every solver failed; the first one's error.
    """
    import solvers

    watch = Stopwatch()
    chosen = list(names or [name for name in solvers.names() if name != "auto"])
    for name in chosen:
        check_solver(name)
    parts = split_sources(sources, settings)
    problem = build_problem(parts.fit, settings, progress)
    rows: list[dict[str, Any]] = []
    results: list[Result] = []
    failed: list[dict[str, str]] = []
    first_error: PlacerError | None = None
    placements: dict[str, Placement] = {}
    judged = {"requests": 0, "tokens": 0}
    for name in chosen:
        progress(f"solving with {name}")
        cap = settings.max_imbalance if name in CAPPED_SOLVERS else None
        try:
            result = run_solver(replace(problem, max_imbalance=cap), replace(settings, solver=name))
        except PlacerError as error:
            failed.append({"solver": name, "error": error.message})
            first_error = first_error or error
            continue
        progress(f"judging {name}")
        placement = placement_of(problem, result)
        evaluation = evaluate(
            placement,
            {"contiguous": contiguous_like(placement)},
            parts.judge,
            scope=parts.scope,
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
            seed=settings.seed,
        )
        results.append(result)
        placements[name] = placement
        judged = {"requests": evaluation.requests, "tokens": evaluation.tokens}
        rows.append(
            {
                "solver": name,
                "status": result.status,
                "objective": result.objective,
                "lower_bound": result.lower_bound,
                "bound_of": result.bound_of,
                "gap": result.gap,
                "seconds": round(result.seconds, 3),
                "metrics": evaluation.metrics,
                "change": evaluation.changes["contiguous"],
            }
        )
    if not rows and first_error is not None:
        raise first_error
    timed = modelled_step_times(placements, parts, settings, progress)
    progress("proving bounds")
    for row, bound in zip(rows, bounds_of_results(problem, results), strict=True):
        if bound is not None:
            row |= {"lower_bound": bound.lower_bound, "bound_of": "objective", "gap": bound.gap}
            row["bound_max_imbalance"] = bound.max_imbalance
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "scope": parts.scope,
        "modelled": True,
        **judged,
        "dispatch": settings.dispatch,
        "objective": settings.objective,
        "max_imbalance": settings.max_imbalance,
        "num_ranks": settings.num_ranks,
        "num_nodes": settings.num_nodes,
        "slots_per_rank": problem.slots_per_rank,
        "seed": settings.seed,
        "rows": rows,
        "failed": failed,
        **watch.compiling(),
        **timed,
    }

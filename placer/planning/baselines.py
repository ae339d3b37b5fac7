"""Placements that other methods make for the ranks, and from the requests, that a plan was."""

from __future__ import annotations

from collections.abc import Sequence

from placer.errors import UsageError
from placer.placement import Placement
from placer.plan import Plan
from placer.planning.making import check_solver, placement_of, run_solver
from placer.planning.parts import split_sources
from placer.planning.posing import build_problem
from placer.planning.settings import Settings
from placer.trace.source import TraceSource


def solved_baseline(name: str, plan: Plan, sources: Sequence[TraceSource]) -> Placement:
    """What a solver makes of the requests of these traces that the plan was fitted to.

    Args:
        name: of the solver.
        plan: gives ranks, nodes, slots, dispatch model, phase, expert groups, and how requests
            were split.
        sources: the traces that the plan was made from, or others of its model.

    Raises:
        UsageError: no such solver, or traces of another model.
    """
    check_solver(name)
    placement, provenance = plan.placement, plan.provenance
    split, asked = provenance.get("split") or {}, provenance.get("settings") or {}
    settings = Settings(
        num_ranks=placement.num_ranks,
        num_nodes=placement.num_nodes,
        slots_per_rank=placement.slots_per_rank,
        dispatch=plan.dispatch,
        objective="traffic",
        max_imbalance=None,
        phase=asked.get("phase"),
        expert_groups=asked.get("expert_groups"),
        solver=name,
        seed=int(split.get("seed", 0)),
        holdout=float(split.get("holdout", 0.5)),
        in_sample=bool(split.get("in_sample", False)),
    )
    problem = build_problem(split_sources(sources, settings).fit, settings, lambda _: None)
    theirs = (problem.num_layers, problem.num_experts)
    if theirs != (placement.num_layers, placement.num_experts):
        raise UsageError(
            f"the traces for baseline {name} have {theirs[0]} layers x {theirs[1]} experts, the "
            f"plan {placement.num_layers} x {placement.num_experts}",
            "give the traces that the plan was made from",
        )
    return placement_of(problem, run_solver(problem, settings))

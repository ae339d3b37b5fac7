"""Bounds on span and messages that hold layer by layer: the columns' where there are any.

A bound on a figure is the sum over layers of the best one that is known for each of them: the
cheap one of `solvers.bounds.traffic`, or that of `solvers.bounds.columns`, which needs every slot
filled by an expert of its own. Where imbalance has a cap, `solvers.bounds.levels` makes use of it.
Pins and limits on moves only take placements away, so the bounds hold with them too. Messages with
coherent dispatch are twice the span, less one for the home rank and one for the rank of the primary
expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from solvers import check
from solvers.bounds.bound import Bound
from solvers.bounds.certifying import prover
from solvers.bounds.curve import Curve
from solvers.bounds.spare import spare_total
from solvers.bounds.traffic import layer_bounds, node_traffic_bound
from solvers.bounds.transport import ROUNDING
from solvers.budget import Budget
from solvers.clock import working_s
from solvers.problem import Problem
from solvers.solving import capped_imbalance

_CHEAP, _COLUMNS, _COPIES = "transport problems", "column generation", "priced copies"
_CHEAP_SHARE, _FOR_NODES = 0.3, 0.1  # of a time limit


@prover("span")
def bound_span(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Pairs that ranks have room for; columns."""
    return _prove("span", problem, parts, budget)


@prover("messages_alltoall")
def bound_messages(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Pairs that ranks have room for, and experts that can be at the tokens' homes; columns."""
    return _prove("messages_alltoall", problem, parts, budget)


@prover("messages_coherent")
def bound_coherent(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Pairs and flow that ranks have room for; columns for the span."""
    return _prove("messages_coherent", problem, parts, budget)


@prover("objective")
def bound_traffic(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Messages by columns, and messages between nodes by the pairs that these have room for."""
    figure = f"messages_{problem.dispatch}"
    if problem.objective != "traffic" or problem.link_cost is not None or figure not in parts:
        return None
    if problem.num_nodes == 1 or problem.num_workloads > 1:
        return None
    messages = _prove(figure, problem, parts, budget.part(1 - _FOR_NODES))
    if messages is None:
        return None
    lower = (messages.lower_bound + node_traffic_bound(problem, budget)) * (1 - ROUNDING)
    value = check.objective(problem, parts)
    return replace(messages, figure="objective", value=value, lower_bound=lower)


def _prove(figure: str, problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """The cheap bound on one figure, or that of columns where there is time for it."""
    if problem.tokens is None or figure not in parts:
        return None
    start = working_s()
    cheap = layer_bounds(problem, figure, budget.part(_CHEAP_SHARE))
    total, method, cap = float(cheap.sum()), _CHEAP, np.inf
    if problem.num_slots > problem.num_experts:
        found = None if budget.expired() else spare_total(problem, figure, cheap, budget)
        if found is not None and found > total:
            total, method = found, _COPIES
    elif not budget.expired():
        if problem.max_imbalance is not None:
            cap = max(problem.max_imbalance, capped_imbalance(parts))
        curve = Curve.of(problem, figure, cheap, cap, budget)
        known = -np.inf if curve is None else curve.total(cap, budget)
        if known > total:
            total, method = known, _COLUMNS
    lower = max(0.0, total / (len(problem.tokens) * problem.num_layers) * (1 - ROUNDING))
    seconds = working_s() - start
    among = None if method != _COLUMNS or cap == np.inf else cap
    return Bound(figure, parts[figure], lower, method, seconds, among)


def bounds_as_balanced(
    problem: Problem, figure: str, parts: Sequence[dict[str, float]], budget: Budget
) -> list[Bound]:
    """A bound for each of several placements: what none that is as balanced is below.

    With redundant slots one that none at all is below.

    Args:
        parts: of each placement, from `solvers.check.check`.
        budget: for all of them together; what is proven for one helps the others.

    Returns:
        Empty where no more than the cheap bound is proven.
    """
    caps = [capped_imbalance(figures) for figures in parts]
    if not caps or problem.tokens is None:
        return []
    count = len(problem.tokens) * problem.num_layers
    cheap = layer_bounds(problem, figure)
    if problem.num_slots > problem.num_experts:
        start = working_s()
        total = spare_total(problem, figure, cheap, budget)
        if total is None:
            return []
        lower, seconds = total / count * (1 - ROUNDING), working_s() - start
        return [Bound(figure, each[figure], lower, _COPIES, seconds) for each in parts]
    curve = Curve.of(problem, figure, cheap, float(np.median(caps)), budget)
    if curve is None:
        return []
    for number, cap in enumerate(caps):
        share = 1 / (len(caps) - number)
        effort = None if budget.effort is None else budget.effort * (number + 1) / len(caps)
        curve.total(cap, replace(budget.part(share), effort=effort))
    found = []
    for cap, figures in zip(caps, parts, strict=True):
        start = working_s()
        lower = max(0.0, curve.known_total(cap) / count * (1 - ROUNDING))
        seconds = working_s() - start
        found.append(Bound(figure, figures[figure], lower, _COLUMNS, seconds, cap))
    return found

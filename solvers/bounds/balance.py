"""A bound on imbalance, see `solvers.bounds.load`."""

from __future__ import annotations

from solvers.bounds.bound import Bound
from solvers.bounds.certifying import prover
from solvers.bounds.load import imbalance_bound
from solvers.bounds.transport import ROUNDING
from solvers.budget import Budget
from solvers.clock import working_s
from solvers.problem import Problem


@prover("imbalance")
def imbalance_by_pigeonhole(
    problem: Problem, parts: dict[str, float], budget: Budget
) -> Bound | None:
    """The hottest experts of each layer have to go somewhere."""
    start = working_s()
    lower = imbalance_bound(problem) * (1 - ROUNDING)
    seconds = working_s() - start
    return Bound("imbalance", parts["imbalance"], lower, "hottest experts", seconds)

"""A bound on imbalance, see `solvers.bounds.load`."""

from __future__ import annotations

import time

from solvers.bounds.bound import Bound
from solvers.bounds.certifying import prover
from solvers.bounds.load import imbalance_bound
from solvers.bounds.transport import ROUNDING
from solvers.budget import Budget
from solvers.problem import Problem


@prover("imbalance")
def imbalance_by_pigeonhole(
    problem: Problem, parts: dict[str, float], budget: Budget
) -> Bound | None:
    """The hottest experts of each layer have to go somewhere."""
    start = time.perf_counter()
    lower = imbalance_bound(problem) * (1 - ROUNDING)
    seconds = time.perf_counter() - start
    return Bound("imbalance", parts["imbalance"], lower, "hottest experts", seconds)

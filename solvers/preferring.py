"""Which of several placements is better, by what the checker makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from solvers import check
from solvers.problem import Problem

Worth = tuple[bool, float, float]


def worth(problem: Problem, placement: NDArray[np.integer]) -> Worth:
    """Less is better: whether the cap is broken; if so, the imbalance; the objective.

    One run of the checker. Raises what `solvers.check` raises.
    """
    from solvers.solving import capped_imbalance, keeps_cap

    parts = check.check(problem, placement)
    broken = not keeps_cap(problem, parts)
    return broken, capped_imbalance(parts) if broken else 0.0, check.objective(problem, parts)


def imbalance_of_loads(problem: Problem, placement: NDArray[np.integer]) -> float:
    """What the cap is about, of experts with a copy each: it takes no token to tell."""
    from solvers.solving import capped_imbalance

    plain = replace(problem, tokens=None, primary=None, home=None, batch=None)
    plain = replace(plain, scenario=None, affinity=None, coactivation=None)
    return capped_imbalance(check.check(plain, placement))


def or_current(problem: Problem, placement: NDArray[np.int64]) -> NDArray[np.int64]:
    """[L, S] the placement, or the one in use where that is allowed and better."""
    current = problem.current
    if current is None or np.array_equal(placement, current):
        return placement
    try:
        before = worth(problem, current)
    except check.BrokenLimit:
        return placement
    try:
        return current if before < worth(problem, placement) else placement
    except check.BrokenLimit:
        return current

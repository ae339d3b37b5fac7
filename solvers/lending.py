"""What published methods make of redundant slots, for a search to go on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import get
from solvers.result import NoSolutionFound


def borrowed(
    problem: Problem, names: Iterable[str], seed: int, budget: Budget
) -> Iterator[NDArray[np.integer]]:
    """[L, S] placement of each solver, until one is out of time.

    None where more is asked of where experts sit than they know; a solver whose arrays the problem
    lacks is passed over.
    """
    if problem.restrictions:
        return
    for solver in map(get, names):
        if any(getattr(problem, array) is None for array in solver.needs):
            continue
        try:
            placement = solver.function(problem, seed, budget).placement
        except NoSolutionFound:
            return
        yield placement

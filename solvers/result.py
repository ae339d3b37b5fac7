"""`Result`: what a placement solver gives back, and how good it provably is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
Termination = Literal["finished", "time_limit", "interrupted"]


class RequestError(ValueError):
    """What a solver is asked makes no sense, or it lacks what it needs; "what is wrong; way out".

    Any other ValueError of a solver is a defect of it.
    """


class InfeasibleProblem(ValueError):
    """No placement satisfies the constraints (or none that this solver can make)."""


class NoSolutionFound(Exception):
    """The time limit passed before there was any placement."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What one solver returns to `solvers.solve`, before it is checked.

    Attributes:
        placement: [L, S] logical expert of each slot, -1 = empty.
        lower_bound: a proven bound on `bound_of`, or None.
        bound_of: the name of the checked figure that lower_bound bounds ("objective" or a key of
            `Result.parts`, e.g. "cross_rank_fraction").
        optimal: whether the solver proved the placement optimal for `bound_of`.
        termination: why it stopped.
        notes: figures of the solver's own worth keeping (iterations, restarts, ...).
    """

    placement: NDArray[np.int64]
    lower_bound: float | None = None
    bound_of: str = "objective"
    optimal: bool = False
    termination: Termination = "finished"
    notes: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Result:
    """A checked placement.

    Attributes:
        placement: [L, S] logical expert of each slot, -1 = empty.
        status: "optimal" only when proved; otherwise "feasible", or "infeasible" when the best
            placement that was found breaks the cap on imbalance.
        termination: why the solver stopped.
        objective: value of the problem's objective, recomputed by `solvers.check`.
        parts: the figures that the objective is made of, all in-sample, recomputed as well.
        lower_bound, bound_of, gap: a proven bound, the figure that it bounds, and
            (value - bound) / value; None where nothing is proven.
        seconds: wall-clock time of the solver.
        solver, seed: which solver, with which seed.
        notes: figures of the solver's own.
    """

    placement: NDArray[np.int64]
    status: Status
    termination: Termination
    objective: float
    parts: dict[str, float]
    lower_bound: float | None
    bound_of: str | None
    gap: float | None
    seconds: float
    solver: str
    seed: int
    notes: dict[str, float | int | str] = field(default_factory=dict)

"""`solve`: run a solver by name, check what it made, and say how good it provably is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np

from solvers import bounds, check
from solvers.budget import Budget
from solvers.clock import working_s
from solvers.problem import Problem
from solvers.registry import get
from solvers.rehearsing import rehearse
from solvers.result import InfeasibleProblem, RequestError, Result, Solution, Status

PROOF_SHARE = 0.15  # of a time limit, at most, for the bound that every result has
TOLERANCE = 1e-9  # relative; between a bound and a value that should meet
_OBJECTIVE_FIGURE = {objective: figure for objective, (figure, _) in check.PAIRWISE.items()}


def solve(
    problem: Problem,
    solver: str = "local_search",
    seed: int = 0,
    time_limit: float | None = None,
    budget: Budget | None = None,
) -> Result:
    """Solve `problem` with the solver called `solver`.

    A result without a bound of the solver's own gets the one on the objective of `solvers.bounds`.
    A time limit is kept by the bound and the solver together. Compiling what they run comes before
    it begins, and checking the placement once after it, however large the problem is.

    The first Ctrl-C asks the solver to return the best placement that it has; the second raises
    KeyboardInterrupt. The placement is checked and its figures recomputed by `solvers.check`.

    Args:
        problem: what is to be placed.
        solver: a name from `solvers.names()`.
        seed: for solvers that draw random numbers.
        time_limit: seconds of wall-clock time; None = as long as the solver likes.
        budget: instead of `time_limit`, a budget that another thread may stop.

    Raises:
        RequestError: an unknown solver, an array that it needs is missing, or a restriction that
            it does not know.
        InfeasibleProblem, NoSolutionFound: from the solver.
    """
    entry = get(solver)
    missing = [name for name in entry.needs if getattr(problem, name) is None]
    if missing:
        raise RequestError(
            f"solver {solver!r} needs {' and '.join(missing)}, which the problem lacks"
        )
    if problem.restrictions and not entry.restricted:
        asked = " and ".join(problem.restrictions)
        raise RequestError(f"solver {solver!r} does not know {asked}; auto and local_search do")
    if budget is None:
        budget = Budget(time_limit)
    elif time_limit is not None:
        raise ValueError("give time_limit or budget, not both")
    with ctrl_c_stops(budget):
        if budget.seconds is not None:
            rehearse(problem, entry, budget)
        bound = bounds.lower_bound(problem, budget.part(PROOF_SHARE))
        start = working_s()
        solution = entry.function(problem, seed, budget)
    seconds = working_s() - start
    return result_of(problem, solution, solver, seed, seconds, bound)


def capped_imbalance(parts: dict[str, float]) -> float:
    """The checked figure that a cap on imbalance is about.

    Over the scenarios where there are any; with replicas, and tokens, it is that of the load that
    ranks serve when tokens choose their copies.
    """
    served = parts.get("imbalance_served", parts["imbalance"])
    return parts.get("imbalance_scenarios", served)


def keeps_cap(problem: Problem, parts: dict[str, float]) -> bool:
    """Whether a placement with these checked figures keeps the cap on imbalance."""
    cap = problem.max_imbalance
    return cap is None or capped_imbalance(parts) <= cap * (1 + TOLERANCE)


def result_of(
    problem: Problem,
    solution: Solution,
    solver: str,
    seed: int,
    seconds: float,
    proven: float | None,
) -> Result:
    """Check a solution; `proven` bounds the objective where the solver itself proves nothing.

    Raises:
        InfeasibleProblem: the placement breaks what was asked of where experts sit.
    """
    try:
        parts = check.check(problem, solution.placement)
    except check.BrokenLimit as error:
        raise InfeasibleProblem(
            f"solver {solver!r} found no placement that is allowed: {error}"
        ) from error
    except ValueError as error:
        raise AssertionError(f"internal error: solver {solver!r} made: {error}") from error
    value = check.objective(problem, parts)
    within_cap = keeps_cap(problem, parts)
    bound, bound_of = solution.lower_bound, solution.bound_of
    if bound is None:
        bound, bound_of = proven, "objective"
    bounded = value if bound_of == "objective" else parts[bound_of]
    status: Status = "feasible" if within_cap else "infeasible"
    gap: float | None = None
    if bound is not None:
        slack = TOLERANCE * max(1.0, abs(bounded))
        if bound > bounded + slack and within_cap:
            raise AssertionError(
                f"internal error: solver {solver!r} proved {bound_of} >= {bound}, "
                f"but its placement has {bounded}"
            )
        bound = min(bound, bounded)
        gap = (bounded - bound) / bounded if bounded > 0 else 0.0
        is_objective = bound_of in ("objective", _OBJECTIVE_FIGURE.get(problem.objective))
        if within_cap and is_objective and bounded - bound <= slack:
            status = "optimal"
    return Result(
        placement=np.ascontiguousarray(solution.placement, dtype=np.int64),
        status=status,
        termination=solution.termination,
        objective=value,
        parts=parts,
        lower_bound=bound,
        bound_of=None if bound is None else bound_of,
        gap=gap,
        seconds=seconds,
        solver=solver,
        seed=seed,
        notes=dict(solution.notes),
    )


@contextmanager
def ctrl_c_stops(budget: Budget) -> Iterator[None]:
    """Turn the first Ctrl-C into `budget.stop()`.

    Only the main thread can, and only where nobody else has claimed Ctrl-C.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if budget.interrupted:
            signal.default_int_handler(number, frame)
        budget.stop()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

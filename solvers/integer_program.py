"""A small modelling layer: an integer linear program, written once, and what solves it.

    program = IntegerProgram()
    x, y, z = program.binaries(3)
    (most,) = program.integers(1, 0, 10)
    program.implies([x, y], z)                  # x + y - z <= 1
    program.total([x, y, z], 2)                 # x + y + z = 2
    program.at_most({x: 3, y: 4, most: -1}, 0)  # 3 x + 4 y <= most
    program.minimise({most: 2, z: 5})
    answer = solve(program, "cp_sat", start, effort=10.0, budget=Budget())

All coefficients are integers, so that every back end counts exactly what the others do.

| back end | through | limit on the work | same answer everywhere | Ctrl-C, `Budget.stop` |
| --- | --- | --- | --- | --- |
| `cp_sat` | OR-tools | its deterministic time | yes | at once |
| `highs` | OR-tools MathOpt | nodes, and seconds | no: the seconds | between slices |
| `scip` | OR-tools pywraplp | nodes, and seconds | no: the seconds | at once |
| `cbc` | PuLP | nodes, and seconds | no: the seconds | between slices |

HiGHS and CBC cannot be stopped from outside, so they run in slices of 0.5, 1, 2, 4, ... seconds,
each from the best point of the one before.

Every back end starts from a feasible point, and none answers with a worse one.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget

Backend = Literal["cp_sat", "highs", "scip", "cbc"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_NODES_PER_EFFORT = 500
_SECONDS_PER_EFFORT = 3.0
_FIRST_SLICE_SECONDS = 0.5

Point = NDArray[np.int64]


@dataclass
class IntegerProgram:
    """maximise weights x, x integer within limits, under clauses and rows.

    Attributes:
        limits: (least, most) of each variable; variables are numbered from 0.
        implications: (variables, consequence), all binary: if all variables are 1, so is the
            consequence.
        rows: (coefficients, least, most): least <= coefficients x <= most; None = no limit.
        weights: of the variables in the objective.
    """

    limits: list[tuple[int, int]] = field(default_factory=list)
    implications: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    rows: list[tuple[dict[int, int], int | None, int]] = field(default_factory=list)
    weights: dict[int, int] = field(default_factory=dict)

    @property
    def num_variables(self) -> int:
        return len(self.limits)

    def binaries(self, count: int) -> range:
        """New variables that are 0 or 1."""
        return self.integers(count, 0, 1)

    def integers(self, count: int, least: int, most: int) -> range:
        """New variables within limits."""
        first = self.num_variables
        self.limits += [(least, most)] * count
        return range(first, self.num_variables)

    def implies(self, variables: Sequence[int], consequence: int) -> None:
        self.implications.append((tuple(variables), consequence))

    def total(self, variables: Sequence[int], number: int) -> None:
        self.rows.append((dict.fromkeys(variables, 1), number, number))

    def at_most(self, coefficients: Mapping[int, int], limit: int) -> None:
        self.rows.append((dict(coefficients), None, limit))

    def between(self, least: int, coefficients: Mapping[int, int], most: int) -> None:
        self.rows.append((dict(coefficients), least, most))

    def maximise(self, weights: Mapping[int, int]) -> None:
        self.weights = dict(weights)

    def minimise(self, weights: Mapping[int, int]) -> None:
        self.weights = {variable: -weight for variable, weight in weights.items()}

    def linear_rows(self) -> list[tuple[dict[int, int], int | None, int]]:
        """The rows, and the clauses as rows."""
        clauses = [
            ({**dict.fromkeys(variables, 1), consequence: -1}, None, len(variables) - 1)
            for variables, consequence in self.implications
        ]
        return [*self.rows, *clauses]

    def value(self, point: Point) -> int:
        """The objective at a point."""
        return sum(weight * int(point[v]) for v, weight in self.weights.items())

    def is_feasible(self, point: Point) -> bool:
        """Whether a point keeps every limit, clause and row."""
        for value, (least, most) in zip(point, self.limits, strict=True):
            if not least <= value <= most:
                return False
        for coefficients, lowest, highest in self.linear_rows():
            total = sum(weight * int(point[v]) for v, weight in coefficients.items())
            if total > highest or (lowest is not None and total < lowest):
                return False
        return True


@dataclass(frozen=True, eq=False)
class Answer:
    """What a back end found.

    Attributes:
        values: [num_variables] the best point, at worst the one to begin with.
        upper_bound: proven bound on the objective, None if the back end tells none.
        optimal: whether `values` was proved optimal.
    """

    values: Point
    upper_bound: float | None
    optimal: bool


def solve(
    program: IntegerProgram, backend: Backend, start: Point, effort: float, budget: Budget
) -> Answer:
    """Solve `program`.

    Args:
        program: what to solve.
        backend: what solves it.
        start: [num_variables] a feasible point to begin with.
        effort: limit on the work; roughly seconds.
        budget: wall-clock limit and interruption.
    """
    assert program.is_feasible(start)
    run = {"cp_sat": _cp_sat, "scip": _scip, "highs": _in_slices(_highs), "cbc": _in_slices(_cbc)}
    values, upper_bound, proved = run[backend](program, start, effort, budget)
    if values is None or not program.is_feasible(values):
        return Answer(start, upper_bound, False)
    if program.value(values) < program.value(start):
        return Answer(start, upper_bound, False)
    return Answer(values, upper_bound, proved)


_Found = tuple[Point | None, float | None, bool]
"""The best point, an upper bound, and whether the point was proved optimal; None if unknown."""


def _cp_sat(program: IntegerProgram, start: Point, effort: float, budget: Budget) -> _Found:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x = [
        model.new_bool_var("") if limits == (0, 1) else model.new_int_var(*limits, "")
        for limits in program.limits
    ]
    for variables, consequence in program.implications:
        model.add_bool_or([x[consequence], *(~x[v] for v in variables)])
    for coefficients, least, most in program.rows:
        total = _weighted_sum(cp_model, x, coefficients)
        if least == most:
            model.add(total == most)
            continue
        model.add(total <= most)
        if least is not None:
            model.add(total >= least)
    model.maximize(_weighted_sum(cp_model, x, program.weights))
    for variable, value in zip(x, start, strict=True):
        model.add_hint(variable, int(value))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.interleave_search = True  # all strategies in turn, deterministically
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = effort
    solver.parameters.catch_sigint_signal = False
    if budget.seconds is not None:
        solver.parameters.max_time_in_seconds = budget.remaining()
    status = _run_interruptibly(lambda: solver.solve(model), solver.stop_search, budget)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, None, False
    values = np.array([solver.value(variable) for variable in x], np.int64)
    return values, float(solver.best_objective_bound), status == cp_model.OPTIMAL


def _weighted_sum(cp_model: Any, x: Sequence[Any], weights: Mapping[int, int]) -> Any:
    return cp_model.LinearExpr.weighted_sum([x[v] for v in weights], list(weights.values()))


def _run_interruptibly(run: Callable[[], Any], stop: Callable[[], None], budget: Budget) -> Any:
    """What `run` returns; it runs in a thread of its own, and `stop` ends it with the budget."""
    outcome: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            outcome.append(run())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.05)
        if budget.expired():
            stop()
    if errors:
        raise errors[0]
    return outcome[0]


def _scip(program: IntegerProgram, start: Point, effort: float, budget: Budget) -> _Found:
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("SCIP")
    infinity = solver.infinity()
    x = [solver.IntVar(least, most, "") for least, most in program.limits]
    for coefficients, lowest, highest in program.linear_rows():
        row = solver.Constraint(-infinity if lowest is None else lowest, highest)
        for v, weight in coefficients.items():
            row.SetCoefficient(x[v], weight)
    objective = solver.Objective()
    objective.SetMaximization()
    for v, weight in program.weights.items():
        objective.SetCoefficient(x[v], weight)
    solver.SetHint(x, [float(value) for value in start])
    solver.SetTimeLimit(round(1e3 * min(budget.remaining(), _SECONDS_PER_EFFORT * effort)))
    exact = pywraplp.MPSolverParameters()
    exact.SetDoubleParam(exact.RELATIVE_MIP_GAP, 0.0)
    nodes = max(1, round(_NODES_PER_EFFORT * effort))
    solver.SetSolverSpecificParametersAsString(
        f"limits/nodes = {nodes}\nmisc/catchctrlc = FALSE\n"  # Ctrl-C is for `solve` to see
    )
    status = _run_interruptibly(lambda: solver.Solve(exact), solver.InterruptSolve, budget)
    bound = objective.BestBound()
    upper_bound = float(bound) if abs(bound) < 1e15 else None
    if status not in (solver.OPTIMAL, solver.FEASIBLE):
        return None, None, False
    values = np.array([round(variable.solution_value()) for variable in x], np.int64)
    return values, upper_bound, status == solver.OPTIMAL


_Slice = Callable[[IntegerProgram, Point, int, float], _Found]
"""(program, start, nodes, seconds): one run that cannot be stopped."""


def _in_slices(run: _Slice) -> Callable[[IntegerProgram, Point, float, Budget], _Found]:
    """`run` again and again, twice as long each time, until it is done or the budget is over."""

    def sliced(program: IntegerProgram, start: Point, effort: float, budget: Budget) -> _Found:
        left, seconds = _SECONDS_PER_EFFORT * effort, _FIRST_SLICE_SECONDS
        nodes = max(1, round(_NODES_PER_EFFORT * effort))
        best, best_bound = start, float("inf")
        while left > 0 and not budget.expired():
            seconds = min(seconds, left, budget.remaining())
            started = time.monotonic()
            values, upper_bound, proved = run(program, best, nodes, seconds)
            if upper_bound is not None:
                best_bound = min(best_bound, upper_bound)
            if values is not None and program.value(values) >= program.value(best):
                best = values
                if proved:
                    return best, best_bound, True
            if time.monotonic() - started < 0.9 * seconds:  # the nodes were its limit
                break
            left -= seconds
            seconds *= 2
        return best, best_bound if np.isfinite(best_bound) else None, False

    return sliced


def _highs(program: IntegerProgram, start: Point, nodes: int, seconds: float) -> _Found:
    from ortools.math_opt.python import mathopt

    model = mathopt.Model()
    x = [
        model.add_integer_variable(lb=float(least), ub=float(most))
        for least, most in program.limits
    ]
    for coefficients, lowest, highest in program.linear_rows():
        row = model.add_linear_constraint(
            lb=float("-inf") if lowest is None else float(lowest), ub=float(highest)
        )
        for v, weight in coefficients.items():
            row.set_coefficient(x[v], float(weight))
    model.objective.is_maximize = True
    for v, weight in program.weights.items():
        model.objective.set_linear_coefficient(x[v], float(weight))
    parameters = mathopt.SolveParameters(  # HiGHS through MathOpt refuses `threads`
        time_limit=timedelta(seconds=seconds),
        node_limit=nodes,
        relative_gap_tolerance=0.0,
        random_seed=0,
    )
    hint = mathopt.SolutionHint(
        variable_values={variable: float(v) for variable, v in zip(x, start, strict=True)}
    )
    result = mathopt.solve(
        model,
        mathopt.SolverType.HIGHS,
        params=parameters,
        model_params=mathopt.ModelSolveParameters(solution_hints=[hint]),
    )
    bound = result.termination.objective_bounds.dual_bound
    upper_bound = float(bound) if np.isfinite(bound) else None
    if not result.has_primal_feasible_solution():
        return None, upper_bound, False
    found = result.variable_values()
    values = np.array([round(found[variable]) for variable in x], np.int64)
    proved = result.termination.reason == mathopt.TerminationReason.OPTIMAL
    return values, upper_bound, proved


def _cbc(program: IntegerProgram, start: Point, nodes: int, seconds: float) -> _Found:
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces names of PuLP 4 that PuLP 2 lacks
        warnings.simplefilter("ignore", DeprecationWarning)
        # minimised: told to maximise, CBC 2.10.3 mistakes the sign of the start's value, prunes
        # what is better and calls the start optimal
        model = pulp.LpProblem("placement", pulp.LpMinimize)
        x = [
            pulp.LpVariable(f"x{v}", lowBound=least, upBound=most, cat="Integer")
            for v, (least, most) in enumerate(program.limits)
        ]
        model += pulp.LpAffineExpression((x[v], -weight) for v, weight in program.weights.items())
        for coefficients, lowest, highest in program.linear_rows():
            total = pulp.LpAffineExpression((x[v], weight) for v, weight in coefficients.items())
            if lowest == highest:
                model += total == highest
                continue
            model += total <= highest
            if lowest is not None:
                model += total >= lowest
        for variable, value in zip(x, start, strict=True):
            variable.setInitialValue(int(value))
        command = pulp.PULP_CBC_CMD(
            msg=False,
            warmStart=True,
            timeLimit=max(1.0, seconds),
            maxNodes=nodes,
            gapRel=0.0,
        )
        try:
            model.solve(command)
        except pulp.PulpSolverError:  # CBC crashed or was interrupted
            return None, None, False
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, None, False
    values = np.array([round(variable.value() or 0) for variable in x], np.int64)
    optimal = model.sol_status == pulp.LpSolutionOptimal
    return values, float(program.value(values)) if optimal else None, optimal

"""A small modelling layer: a linear program over binary variables, and what solves it.

    program = BinaryProgram()
    x, y, z = program.binaries(3)
    program.implies([x, y], z)          # x + y - z <= 1
    program.total([x, y, z], 2)         # x + y + z = 2
    program.maximise({x: 3, z: 5})
    answer = solve(program, "cp_sat", start, effort=10.0, budget=Budget())

Back ends: "cp_sat" (OR-tools) on one thread with a limit in its own deterministic time, so that the
same program gives the same answer on every machine; "cbc" (PuLP) with a limit on nodes and on
seconds, and deaf to `Budget.stop` (Ctrl-C in a terminal reaches it by itself). Weights are
integers, so that both count exactly.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget

Backend = Literal["cp_sat", "cbc"]
_CBC_NODES_PER_EFFORT = 500
_CBC_SECONDS_PER_EFFORT = 3.0


@dataclass
class BinaryProgram:
    """maximise weights x, x binary, under clauses and totals.

    Attributes:
        num_variables: variables are numbered from 0.
        implications: (variables, consequence): if all variables are 1, so is the consequence.
        totals: (variables, number): exactly so many of them are 1.
        weights: of the variables in the objective.
    """

    num_variables: int = 0
    implications: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    totals: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    weights: dict[int, int] = field(default_factory=dict)

    def binaries(self, count: int) -> range:
        """New variables."""
        first = self.num_variables
        self.num_variables += count
        return range(first, self.num_variables)

    def implies(self, variables: Sequence[int], consequence: int) -> None:
        self.implications.append((tuple(variables), consequence))

    def total(self, variables: Sequence[int], number: int) -> None:
        self.totals.append((tuple(variables), number))

    def maximise(self, weights: Mapping[int, int]) -> None:
        self.weights = dict(weights)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a back end found.

    Attributes:
        values: [num_variables] of the best point, None if there was none in time.
        upper_bound: proven bound on the objective, None if the back end tells none.
        optimal: whether `values` was proved optimal.
    """

    values: NDArray[np.bool_] | None
    upper_bound: float | None
    optimal: bool


def solve(
    program: BinaryProgram,
    backend: Backend,
    start: NDArray[np.bool_],
    effort: float,
    budget: Budget,
) -> Answer:
    """Solve `program`.

    Args:
        program: what to solve.
        backend: what solves it.
        start: [num_variables] a feasible point to begin with.
        effort: limit on the work, whatever the machine's speed; roughly seconds.
        budget: wall-clock limit and interruption.
    """
    if backend == "cp_sat":
        return _solve_cp_sat(program, start, effort, budget)
    return _solve_cbc(program, start, effort, budget)


def _solve_cp_sat(
    program: BinaryProgram, start: NDArray[np.bool_], effort: float, budget: Budget
) -> Answer:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in range(program.num_variables)]
    for variables, consequence in program.implications:
        model.add_bool_or([x[consequence], *(~x[v] for v in variables)])
    for variables, number in program.totals:
        model.add(sum(x[v] for v in variables) == number)
    model.maximize(sum(weight * x[v] for v, weight in program.weights.items()))
    for variable, value in zip(x, start, strict=True):
        model.add_hint(variable, bool(value))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = effort
    solver.parameters.catch_sigint_signal = False
    status = _run_interruptibly(solver, model, budget)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, None, False)
    values = np.array([solver.boolean_value(variable) for variable in x], bool)
    return Answer(values, float(solver.best_objective_bound), status == cp_model.OPTIMAL)


def _run_interruptibly(solver: Any, model: Any, budget: Budget) -> Any:
    """Solve in a thread of its own and watch the budget meanwhile."""
    if budget.seconds is not None:
        solver.parameters.max_time_in_seconds = budget.remaining()
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(solver.solve(model)), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.05)
        if budget.expired():
            solver.stop_search()
    if not outcome:
        raise RuntimeError("CP-SAT ended without a status")
    return outcome[0]


def _solve_cbc(
    program: BinaryProgram, start: NDArray[np.bool_], effort: float, budget: Budget
) -> Answer:
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces names of PuLP 4 that PuLP 2 lacks
        warnings.simplefilter("ignore", DeprecationWarning)
        model = pulp.LpProblem("placement", pulp.LpMaximize)
        x = [pulp.LpVariable(f"x{v}", cat="Binary") for v in range(program.num_variables)]
        model += pulp.lpSum(weight * x[v] for v, weight in program.weights.items())
        for variables, consequence in program.implications:
            model += pulp.lpSum(x[v] for v in variables) - x[consequence] <= len(variables) - 1
        for variables, number in program.totals:
            model += pulp.lpSum(x[v] for v in variables) == number
        for variable, value in zip(x, start, strict=True):
            variable.setInitialValue(int(value))
        command = pulp.PULP_CBC_CMD(
            msg=False,
            warmStart=True,
            timeLimit=max(1.0, min(budget.remaining(), _CBC_SECONDS_PER_EFFORT * effort)),
            maxNodes=max(1, round(effort * _CBC_NODES_PER_EFFORT)),
            gapRel=0.0,
        )
        try:
            model.solve(command)
        except pulp.PulpSolverError:  # CBC crashed or was interrupted
            return Answer(None, None, False)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Answer(None, None, False)
    values = np.array([variable.value() > 0.5 for variable in x], bool)
    optimal = model.sol_status == pulp.LpSolutionOptimal
    objective = float(sum(weight for v, weight in program.weights.items() if values[v]))
    return Answer(values, objective if optimal else None, optimal)

"""The modelling layer: every back end, the same program, the same optimum."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Budget, get
from solvers.integer_program import BACKENDS, IntegerProgram, solve


def clauses() -> IntegerProgram:
    program = IntegerProgram()
    x = program.binaries(5)
    program.total(x, 3)
    program.implies([x[0], x[1]], x[2])
    program.implies([x[3]], x[4])
    program.maximise({x[0]: 5, x[1]: 4, x[3]: 6, x[4]: -3, x[2]: 1})
    return program


@pytest.mark.parametrize("backend", BACKENDS)
def test_back_ends_agree_on_a_knapsack_of_clauses(backend):
    start = np.array([1, 1, 1, 0, 0])
    answer = solve(clauses(), backend, start, effort=5.0, budget=Budget())
    assert answer.optimal
    assert answer.upper_bound == pytest.approx(10)
    assert answer.values.tolist() == [1, 1, 1, 0, 0]


def random_program(seed: int) -> IntegerProgram:
    """Four binaries and an integer, rows on both sides; all zeros is feasible."""
    rng = np.random.default_rng(seed)
    program = IntegerProgram()
    x = [*program.binaries(4), *program.integers(1, -2, 3)]
    for _ in range(3):
        row = {v: int(w) for v, w in zip(x, rng.integers(-4, 5, 5), strict=True)}
        program.between(-int(rng.integers(0, 6)), row, int(rng.integers(0, 6)))
    program.at_most({v: int(w) for v, w in zip(x, rng.integers(0, 5, 5), strict=True)}, 7)
    program.minimise({v: int(w) for v, w in zip(x, rng.integers(-6, 6, 5), strict=True)})
    return program


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_back_end_finds_the_optimum_of_brute_force(backend, seed):
    program = random_program(seed)
    points = itertools.product(*(range(least, most + 1) for least, most in program.limits))
    best = max(
        program.value(np.array(point)) for point in points if program.is_feasible(np.array(point))
    )
    answer = solve(program, backend, np.zeros(5, np.int64), effort=5.0, budget=Budget())
    assert program.is_feasible(answer.values)
    assert (program.value(answer.values), answer.optimal) == (best, True)
    assert answer.upper_bound == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_that_costs_something_is_not_called_optimal(backend):
    """CBC did, where the objective was to be maximised and the start's value was negative."""
    program = IntegerProgram()
    x = program.binaries(6)
    (most,) = program.integers(1, 0, 20)
    program.total(x, 2)
    for v, cost in zip(x, (9, 8, 7, 3, 2, 1), strict=True):
        program.at_most({v: cost, most: -1}, 0)
    program.minimise({most: 1})
    answer = solve(program, backend, np.array([1, 1, 0, 0, 0, 0, 9]), 5.0, Budget())
    assert (answer.values[6], answer.optimal) == (2, True)


def hard_program() -> tuple[IntegerProgram, np.ndarray]:
    """A knapsack with many rows, and a point of it; no back end proves it in seconds."""
    rng = np.random.default_rng(0)
    program = IntegerProgram()
    x = program.binaries(120)
    for _ in range(40):
        program.at_most({v: int(w) for v, w in zip(x, rng.integers(1, 50, 120), strict=True)}, 700)
    program.maximise({v: int(w) for v, w in zip(x, rng.integers(1, 50, 120), strict=True)})
    start = np.zeros(120, np.int64)
    start[:5] = 1
    return program, start


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_back_end_answers_with_less_than_it_began_with(backend):
    """A budget that is over at once leaves the point to begin with, or a better one."""
    program, start = hard_program()
    budget = Budget()
    budget.stop()
    answer = solve(program, backend, start, effort=0.2, budget=budget)
    assert program.is_feasible(answer.values)
    assert program.value(answer.values) >= program.value(start)
    assert answer.upper_bound is None or answer.upper_bound >= program.value(answer.values)


class Interrupting(Budget):
    """The tenth time that it is asked, while the back end runs, somebody presses Ctrl-C."""

    times = 0

    def expired(self) -> bool:
        self.times += 1
        if self.times == 10:
            signal.raise_signal(signal.SIGINT)
        return super().expired()


@pytest.mark.parametrize("backend", ["cp_sat", "scip"])
def test_no_back_end_keeps_an_interrupt_to_itself(backend):
    """SCIP takes Ctrl-C for its own unless told otherwise, and the solver went on."""
    program, start = hard_program()
    budget = Interrupting()
    before = signal.signal(signal.SIGINT, lambda *_: budget.stop())
    try:
        answer = solve(program, backend, start, effort=5.0, budget=budget)
    finally:
        signal.signal(signal.SIGINT, before)
    assert budget.interrupted
    assert not answer.optimal
    assert program.value(answer.values) >= program.value(start)


def test_the_default_back_end_repeats_itself():
    values = [
        solve(random_program(3), "cp_sat", np.zeros(5, np.int64), 5.0, Budget()).values.tolist()
        for _ in range(2)
    ]
    assert values[0] == values[1]


def test_back_ends_print_nothing():
    """HiGHS greets on stdout when it is built by other ways; --json would be spoilt."""
    code = (
        "import numpy as np; from solvers import Budget; "
        "from solvers.integer_program import BACKENDS, IntegerProgram, solve\n"
        "p = IntegerProgram(); x = p.binaries(3); p.total(x, 1); p.maximise({x[1]: 2})\n"
        "for b in BACKENDS: assert solve(p, b, np.array([1, 0, 0]), 1.0, Budget()).optimal"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_solver_is_asked_for_a_back_end_by_a_suffix():
    assert get("exflow:scip").name == "exflow:scip"
    assert get("exflow").deterministic
    assert get("exflow:cp_sat").deterministic
    assert not get("exflow:scip").deterministic
    with pytest.raises(ValueError, match=r"no back end 'gurobi'; there are exflow:cp_sat, "):
        get("exflow:gurobi")
    with pytest.raises(ValueError, match="no back end 'scip'; there are eplb alone"):
        get("eplb:scip")

"""`solve`: what it refuses, what it calls a result, and how it is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from solver_cases import make_problem, topic_tokens

import solvers
from solvers import Budget, Problem, Solution, registry, solve


@pytest.fixture
def fake(monkeypatch):
    """Register a solver for one test; it returns whatever `make(problem, seed, budget)` does."""
    registry.names()  # load the real ones first
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))

    def add(make, **others):
        def function(problem, seed, budget):
            """Made up."""
            return make(problem, seed, budget)

        registry.register("fake", source="test", **others)(function)

    return add


def tiny(**others) -> Problem:
    load = np.array([[3.0, 3, 2, 2]])
    arrays = {"num_ranks": 2, "slots_per_rank": 2, "ranks_per_node": 2, "objective": "balance"}
    return Problem(load=load, **{**arrays, **others})


BALANCED, SKEWED = np.array([[0, 2, 1, 3]]), np.array([[0, 1, 2, 3]])


def test_an_unknown_solver_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"no solver is called 'eplbb'.*eplb_global"):
        solve(tiny(), "eplbb")


def test_missing_arrays_are_named(fake):
    fake(lambda *_: Solution(BALANCED), needs=("tokens", "load", "affinity"))
    with pytest.raises(ValueError, match="'fake' needs tokens and affinity"):
        solve(tiny(), "fake")


@pytest.mark.parametrize("solver", ["contiguous", "eplb", "exflow:scip", "grace_moe", "pairwise"])
def test_restrictions_that_a_solver_does_not_know_are_refused(solver):
    problem = make_problem(topic_tokens(0, num_layers=2), 16, 4, 5)
    pinned = replace(problem, pinned=np.full((2, 16), -1))
    current = np.tile(np.append(np.arange(16), [-1] * 4), (2, 1))
    with pytest.raises(ValueError, match=f"'{solver}' does not know pinned and max_moves"):
        solve(replace(pinned, current=current, max_moves=3), solver)


def test_two_budgets_are_one_too_many():
    with pytest.raises(ValueError, match="not both"):
        solve(tiny(), "contiguous", time_limit=1, budget=Budget(1))


def test_a_value_that_meets_its_bound_is_optimal_and_no_other(fake):
    fake(lambda *_: Solution(BALANCED))
    result = solve(tiny(), "fake")
    assert (result.status, result.objective, result.bound_of) == ("optimal", 1.0, "objective")
    assert result.lower_bound == pytest.approx(1.0)
    assert result.gap == pytest.approx(0.0, abs=1e-9)
    fake(lambda *_: Solution(SKEWED, optimal=True))  # it may say what it likes
    result = solve(tiny(), "fake")
    assert result.status == "feasible"
    assert result.objective == 1.2
    assert result.gap == pytest.approx(0.2 / 1.2)


def test_a_bound_on_another_figure_does_not_make_the_objective_optimal(fake):
    problem = make_problem(topic_tokens(0, num_layers=1), 16, 4, 4)
    problem = replace(problem, load=np.ones((1, 16)))
    placement = np.arange(16)[None]
    fake(lambda *_: Solution(placement, lower_bound=1.0, bound_of="imbalance", optimal=True))
    result = solve(problem, "fake")
    assert (result.bound_of, result.gap, result.status) == ("imbalance", 0.0, "feasible")
    cut = result.parts["coactivation_cut"]
    fake(lambda *_: Solution(placement, lower_bound=cut, bound_of="coactivation_cut"))
    assert solve(problem, "fake").status == "feasible"
    assert solve(replace(problem, objective="coactivation"), "fake").status == "optimal"


def test_a_broken_cap_is_infeasible_whatever_the_bound(fake):
    fake(lambda *_: Solution(SKEWED, lower_bound=1.2))
    assert solve(tiny(max_imbalance=1.2), "fake").status == "optimal"
    assert solve(tiny(max_imbalance=1.1), "fake").status == "infeasible"
    fake(lambda *_: Solution(SKEWED, lower_bound=1.3))  # a bound of placements that keep the cap
    assert solve(tiny(max_imbalance=1.1), "fake").status == "infeasible"


def test_a_bound_above_the_value_is_a_bug_and_rounding_is_not(fake):
    fake(lambda *_: Solution(SKEWED, lower_bound=1.2 + 1e-6))
    with pytest.raises(AssertionError, match="internal error: solver 'fake' proved objective"):
        solve(tiny(), "fake")
    fake(lambda *_: Solution(SKEWED, lower_bound=1.2 + 1e-12))
    result = solve(tiny(), "fake")
    assert result.lower_bound == result.objective
    assert result.status == "optimal"


def test_an_unsound_placement_is_a_bug(fake):
    fake(lambda *_: Solution(np.array([[0, 1, 2, 2]])))
    with pytest.raises(AssertionError, match=r"internal error: .* rank 1 holds expert 2 twice"):
        solve(tiny(), "fake")


def test_the_result_says_what_ran(fake):
    given = Solution(BALANCED.astype(np.int32), notes={"tries": 3}, termination="time_limit")
    fake(lambda *_: given)
    result = solve(tiny(), "fake", seed=7)
    assert (result.solver, result.seed, result.notes) == ("fake", 7, {"tries": 3})
    assert result.termination == "time_limit"
    assert result.placement.dtype == np.int64
    assert result.parts["imbalance"] == result.objective
    assert result.seconds >= 0


def test_solvers_get_the_limit_and_the_seed(fake):
    seen = {}

    def make(problem, seed, budget):
        seen.update(seed=seed, seconds=budget.seconds)
        return Solution(BALANCED)

    fake(make)
    solve(tiny(), "fake", seed=5, time_limit=12.0)
    assert seen == {"seed": 5, "seconds": 12.0}
    own = Budget(3.0)
    solve(tiny(), "fake", budget=own)
    assert seen["seconds"] == 3.0


def interrupting(times):
    def make(problem, seed, budget):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return Solution(BALANCED, termination="interrupted" if budget.expired() else "finished")

    return make


def test_the_first_interrupt_asks_for_the_best_so_far(fake):
    fake(interrupting(1))
    assert solve(tiny(), "fake").termination == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_is_raised(fake):
    fake(interrupting(2))
    with pytest.raises(KeyboardInterrupt):
        solve(tiny(), "fake")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_that_somebody_else_handles_are_left_alone(fake):
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        fake(interrupting(2))
        assert solve(tiny(), "fake").termination == "finished"
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [1, 1]


def test_solving_works_outside_the_main_thread(fake):
    fake(lambda *_: Solution(BALANCED))
    results = []
    thread = threading.Thread(target=lambda: results.append(solve(tiny(), "fake")))
    thread.start()
    thread.join()
    assert results[0].status == "optimal"


def test_a_budget_can_be_stopped_from_outside():
    budget = Budget()
    assert not budget.expired()
    assert budget.remaining() == float("inf")
    budget.stop()
    assert budget.expired()
    assert budget.interrupted


def test_parts_of_a_budget_share_its_time_and_its_end():
    whole = Budget(1000.0)
    part = whole.part(0.25)
    assert 249 < part.remaining() <= 250
    assert Budget().part(0.5).seconds is None
    part.stop()
    assert whole.expired()


@pytest.mark.parametrize("num_groups", [0, 3])
def test_groups_must_divide_the_experts(num_groups):
    with pytest.raises(ValueError, match="groups do not divide 4 experts"):
        tiny(num_groups=num_groups)


def test_importing_solvers_loads_nothing_heavy():
    code = (
        "import sys, solvers; "
        "heavy = {'ortools', 'pulp', 'scipy', 'torch', 'placer'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_solvers_exports_is_there():
    assert all(hasattr(solvers, name) for name in solvers.__all__)

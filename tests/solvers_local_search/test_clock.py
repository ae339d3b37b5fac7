"""Compiling is timed apart: no time of a limit, and those who watch are told of it."""

from __future__ import annotations

import threading
import time

import numba
import numpy as np
import pytest

from solvers import Budget, compiling
from solvers.clock import COMPILE_CLOCK, CompileClock
from solvers.parallel import stopping


@pytest.fixture
def now(monkeypatch):
    """What the clock on the wall says, to be changed at will."""
    told = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: told[0])
    return told


def test_the_clock_runs_from_the_first_kernel_to_the_last_that_nest(now):
    clock = CompileClock()
    told = []
    with clock.watched(told.append):
        for move in (clock.begin, clock.begin, clock.end, clock.end):
            move()
            now[0] += 1.0
    assert clock.seconds() == 3.0
    assert told == [True, False]
    clock.begin()
    clock.end()
    assert told == [True, False]


def test_the_working_clock_stands_still_meanwhile(now):
    clock = CompileClock()
    began = clock.working_s()
    clock.begin()
    now[0] += 30.0
    assert clock.working_s() == began
    assert clock.seconds() == 30.0
    clock.end()
    now[0] += 2.0
    assert clock.working_s() == began + 2.0


def test_no_budget_pays_for_compiling(now):
    budget = Budget(10.0)
    COMPILE_CLOCK.begin()
    now[0] += 60.0
    assert not budget.expired()
    COMPILE_CLOCK.end()
    assert budget.remaining() == 10.0
    now[0] += 10.0
    assert budget.expired()


def test_numba_reports_what_it_compiles_from_any_thread_and_not_what_it_has():
    @numba.njit
    def fresh(number):
        return number + 1

    told = []
    before = COMPILE_CLOCK.seconds()
    with COMPILE_CLOCK.watched(told.append):
        thread = threading.Thread(target=fresh, args=(1,))
        thread.start()
        thread.join()
    assert told == [True, False]
    after = COMPILE_CLOCK.seconds()
    assert after > before
    fresh(1)
    assert COMPILE_CLOCK.seconds() == after


def test_a_kernel_without_a_folder_to_be_kept_in_is_compiled_all_the_same(monkeypatch):
    monkeypatch.setattr(COMPILE_CLOCK, "kept", True)
    real = numba.njit

    def nowhere(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(compiling.numba, "njit", nowhere)

    @compiling.compiled
    def double(number):
        return 2 * number

    assert double(4) == 8
    assert not COMPILE_CLOCK.kept


def test_a_budget_is_not_asked_while_kernels_are_compiled(monkeypatch):
    clock = CompileClock()
    monkeypatch.setattr("solvers.parallel.COMPILE_CLOCK", clock)
    monkeypatch.setattr("solvers.parallel.POLL_S", 0.001)
    asked = threading.Event()

    class Asked(Budget):
        def expired(self):
            asked.set()
            return True

    clock.begin()
    with stopping(np.zeros(1, np.int64), Asked()):
        time.sleep(0.05)
        assert not asked.is_set()
        clock.end()
        assert asked.wait(10.0)

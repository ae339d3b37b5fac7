"""Whose mistake an error is: the user's is a sentence, a solver's own comes through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import solvers
from placer.errors import InfeasibleError, UsageError
from placer.planning import Settings, build_problem, make_plan, posing, run_solver
from placer.trace import MemorySource
from solvers import registry
from tests.conftest import topic_trace

ROBUST = Settings(num_ranks=4, robust="worst", solver="broken")


@pytest.fixture
def broken():
    """A solver with a defect, known for the length of one test."""

    def function(problem, seed, budget):
        """Adds arrays of unlike shapes."""
        return np.zeros(3) + np.zeros(2)

    registry.names()
    registry.register("broken", source="a test")(function)
    yield
    del registry._SOLVERS["broken"]


@pytest.fixture(scope="module")
def source():
    return MemorySource(topic_trace(num_requests=48))


def test_a_defect_of_a_solver_is_no_mistake_of_the_user_s(source, broken):
    with pytest.raises(ValueError, match="broadcast") as caught:
        make_plan([source], ROBUST)
    assert not isinstance(caught.value, solvers.RequestError)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"solver": "nobody"}, "no solver is called 'nobody'"),
        ({"solver": "eplb", "pins": ("3@0",)}, "'eplb' does not know pinned"),
        ({"objective": "affinity", "pins": ("3@0",)}, "no solver minimises affinity and keeps"),
    ],
)
def test_what_a_solver_cannot_be_asked_is_a_usage_error(source, asked, message):
    settings = Settings(**{"num_ranks": 4, "time_limit_s": 1.0} | asked)
    with pytest.raises(UsageError, match=message) as caught:
        run_solver(build_problem(source, settings, lambda _: None), settings)
    assert caught.value.hint


def test_an_objective_without_what_it_is_computed_from_is_a_usage_error():
    one_layer = MemorySource(topic_trace(num_layers=1))
    for solver in ("eplb", "pairwise"):
        settings = Settings(num_ranks=4, objective="affinity", solver=solver)
        with pytest.raises(UsageError, match="two layers or more"):
            run_solver(build_problem(one_layer, settings, lambda _: None), settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"slot_budget": 3}, "need 24"),
        ({"pins": tuple(f"{expert}@0" for expert in range(5))}, "more experts are pinned"),
    ],
)
def test_what_no_placement_can_keep_is_infeasible(source, asked, message):
    with pytest.raises(InfeasibleError, match=message):
        build_problem(source, Settings(num_ranks=4, **asked), lambda _: None)


def test_a_contradiction_in_the_problem_s_arrays_is_a_defect(source, monkeypatch):
    monkeypatch.setattr(posing, "rank_speed", lambda _: np.zeros(4))
    with pytest.raises(ValueError, match="positive"):
        build_problem(source, Settings(num_ranks=4, cluster="h100-nvl8"), lambda _: None)


def test_a_workload_without_a_token_in_the_sample_is_named():
    trace = topic_trace(num_requests=48)
    labels = {request: "small" if request == 47 else "large" for request in range(48)}
    source = MemorySource(replace(trace, labels=labels))
    few = Settings(num_ranks=4, robust="worst", profile_tokens=3)
    with pytest.raises(UsageError, match="workload small has too few tokens"):
        build_problem(source, few, lambda _: None)

"""The default solver: never worse than what it tries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import solvers

from .cases import problem_of, topic_tokens


@pytest.mark.parametrize("seed", [0, 1])
def test_for_balance_the_best_of_its_solvers_is_returned(seed):
    rng = np.random.default_rng(seed)
    problem = replace(problem_of(topic_tokens(seed), 16, 4, slots_per_rank=5), objective="balance",
                      load=rng.pareto(1.5, (5, 16)) + 0.1)  # fmt: skip
    best = min(solvers.solve(problem, name).objective for name in ("local_search", "eplb"))
    result = solvers.solve(problem, "auto")
    assert result.objective == best
    assert result.notes["chosen"] in ("local_search", "eplb")


def test_for_traffic_it_is_the_search():
    problem = problem_of(topic_tokens(2, num_tokens=200), 16, 4, max_imbalance=1.3)
    result = solvers.solve(problem, "auto")
    assert (result.placement == solvers.solve(problem, "local_search").placement).all()
    assert result.solver == "auto"


def test_a_plan_that_keeps_the_cap_wins_over_a_cheaper_one_that_breaks_it():
    problem = replace(
        problem_of(topic_tokens(3, num_tokens=200), 16, 4, max_imbalance=1.15), objective="balance"
    )
    assert solvers.solve(problem, "auto").status != "infeasible"


@pytest.mark.parametrize("objective", ["affinity", "coactivation"])
def test_pairs_are_not_minimised_under_pins_and_auto_says_so(objective):
    problem = problem_of(topic_tokens(0), 16, 4, objective=objective, pinned=np.full((5, 16), -1))
    with pytest.raises(ValueError, match=f"no solver minimises {objective} and keeps pinned; "):
        solvers.solve(problem, "auto")

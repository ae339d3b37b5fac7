"""The default solver: never worse than what it tries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import solvers
from solvers import check

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


@pytest.mark.parametrize("objective", ["traffic", "affinity", "coactivation"])
@pytest.mark.parametrize("dispatch", ["allgather", "alltoall"])
def test_spare_slots_that_the_search_leaves_empty_are_packed_where_that_keeps_the_cap(
    objective, dispatch
):
    """The search places replicas for tokens that choose them."""
    tokens = np.zeros((40, 2, 2), np.int64)
    tokens[:, :, 1] = 1 + np.arange(40)[:, None] % 3  # all use expert 0
    pairs = np.zeros((2, 4, 4))
    np.add.at(pairs, (np.arange(2), tokens[:, :, [0]], tokens), 1.0)
    problem = problem_of(
        tokens, 4, 4, slots_per_rank=4, dispatch=dispatch, objective=objective, max_imbalance=1.05,
        coactivation=pairs + pairs.swapaxes(1, 2), affinity=pairs[:1],
    )  # fmt: skip
    if dispatch == "alltoall":
        problem = replace(problem, tokens=None, primary=None)
    result = solvers.solve(problem, "auto")
    assert result.status != "infeasible"
    assert dispatch == "allgather" or result.notes["chosen"] == "eplb"


def test_of_plans_that_break_the_cap_the_most_balanced_is_returned():
    tokens = np.zeros((30, 1, 1), np.int64)  # expert 0 has all the load, and two of three slots
    problem = problem_of(tokens, 2, 3, dispatch="allgather", max_imbalance=1.05)
    result = solvers.solve(problem, "auto")
    assert result.status == "infeasible"
    assert solvers.capped_imbalance(result.parts) == 1.5
    stopped = solvers.Budget()
    stopped.stop()
    assert solvers.solve(problem, "auto", budget=stopped).termination == "interrupted"


@pytest.mark.parametrize("solver", ["auto", "local_search"])
@pytest.mark.parametrize("objective", ["traffic", "coactivation"])
def test_a_placement_in_use_that_nothing_beats_stays(solver, objective):
    """The search would not place its replicas: nobody knows which tokens choose them."""
    pairs = np.ones((2, 4, 4))
    everything = np.tile(np.arange(4), (2, 2))
    problem = solvers.Problem(
        load=np.full((2, 4), 4.0), num_ranks=2, slots_per_rank=4, ranks_per_node=2,
        coactivation=pairs, objective=objective, current=everything,
    )  # fmt: skip
    before = check.objective(problem, check.check(problem, everything))
    result = solvers.solve(problem, solver)
    assert result.objective <= before


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent", "allgather"])
def test_copies_with_equal_shares_are_balanced_no_worse_than_by_a_packing(dispatch):
    """The objective counts equal shares of the load, whichever copies the tokens choose."""
    rng = np.random.default_rng(2)
    tokens = np.argsort(rng.random((20, 3, 6)) * np.arange(1, 7), axis=2)[:, :, :4]
    problem = problem_of(tokens, 6, 3, slots_per_rank=3, dispatch=dispatch, objective="balance")
    packed = solvers.solve(problem, "eplb_global").objective
    assert solvers.solve(problem, "local_search").objective <= packed + 1e-12


def test_under_allgather_replicas_are_placed_beside_pins():
    tokens = np.zeros((60, 2, 2), np.int64)
    tokens[:, :, 1] = 1 + np.arange(60)[:, None] % 3  # all use expert 0
    pinned = np.full((2, 4), -1)
    pinned[:, 1] = 2
    problem = problem_of(
        tokens, 4, 4, slots_per_rank=2, dispatch="allgather", pinned=pinned, max_imbalance=1.1
    )
    result = solvers.solve(problem, "auto")
    assert result.status != "infeasible"
    assert ((result.placement == 0).sum(axis=1) > 1).all()

"""The solver for affinity and co-activation, and its exact parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, topic_tokens

from solvers import Budget, Problem, capped_imbalance, solve
from solvers.bounds.certifying import certify
from solvers.chain import kept_flow
from solvers.exact_pairs import (
    _partitions,
    best_chain,
    best_groups,
    chain_work,
    num_partitions,
)
from solvers.proving import prove

FIGURE = {"affinity": "cross_rank_fraction", "coactivation": "coactivation_cut"}


def topic_problem(objective: str, experts: int = 16, ranks: int = 4, **others) -> Problem:
    tokens = topic_tokens(1, num_tokens=300, num_layers=3, num_experts=experts, top_k=2)
    return make_problem(tokens, experts, ranks, experts // ranks, objective=objective, **others)


@pytest.mark.parametrize(
    ("experts", "ranks", "count"), [(4, 2, 3), (6, 3, 15), (8, 2, 35), (8, 4, 105), (12, 2, 462)]
)
def test_partitions_are_all_there_once(experts, ranks, count):
    found = _partitions(experts, ranks)
    assert num_partitions(experts, ranks) == len(found) == count
    assert len(np.unique(found, axis=0)) == count
    assert (np.sort(found, axis=1) == np.repeat(np.arange(ranks), experts // ranks)).all()
    for row in found[:50]:  # groups are named in the order of their first experts
        assert list(dict.fromkeys(row.tolist())) == list(range(ranks))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(4, 2), (6, 2), (6, 3), (4, 4)]))
def test_dynamic_programming_is_brute_force(seed, shape):
    experts, ranks = shape
    rng = np.random.default_rng(seed)
    flow = rng.exponential(1, (2, experts, experts)) ** 2
    found = best_chain(flow, ranks, Budget())
    assert (np.sort(found, axis=1) == np.repeat(np.arange(ranks), experts // ranks)).all()
    rows = _partitions(experts, ranks)
    relabelled = [
        np.array(names)[row]
        for row in rows
        for names in product(range(ranks), repeat=ranks)
        if len(set(names)) == ranks
    ]
    middle = [np.array(row) for row in rows]
    best = max(
        max(float(flow[0][a[:, None] == b].sum()) for a in relabelled)
        + max(float(flow[1][b[:, None] == c].sum()) for c in relabelled)
        for b in middle
    )
    assert kept_flow(flow, found) == pytest.approx(best, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(4, 2), (6, 3), (8, 2), (8, 4), (9, 3)]))
def test_the_search_of_a_layer_is_brute_force(seed, shape):
    experts, ranks = shape
    rng = np.random.default_rng(seed)
    together = rng.exponential(1, (experts, experts)) ** rng.integers(1, 4)
    together = together + together.T
    known = rng.permutation(np.repeat(np.arange(ranks), experts // ranks))
    found = best_groups(together, ranks, known, 10**6)

    def kept(row):
        return float(((row[:, None] == row) * together).sum())

    assert kept(found) == pytest.approx(max(kept(row) for row in _partitions(experts, ranks)))


def test_the_work_of_a_large_chain_is_a_number_too():
    assert chain_work(58, 256, 32) > 1e200


def test_a_search_that_ends_early_proves_nothing():
    together = np.ones((12, 12)) + np.random.default_rng(0).random((12, 12))
    assert best_groups(together + together.T, 3, np.repeat(np.arange(3), 4), 10) is None


@pytest.mark.parametrize("objective", FIGURE)
def test_small_problems_are_solved_to_optimality(objective):
    problem = topic_problem(objective, experts=8, ranks=2)
    result = solve(problem, "pairwise")
    assert result.status == "optimal"
    assert result.gap < 1e-9
    assert result.bound_of == FIGURE[objective]


def test_sixteen_experts_in_three_layers_are_solved_by_the_clique_program():
    problem = topic_problem("affinity")
    assert chain_work(3, 16, 4) > 1e10
    proof = prove(problem, "cross_rank_fraction", None, Budget())
    assert proof.method == "clique program"
    assert 1 - proof.kept <= solve(problem, "pairwise").objective + 1e-9


@pytest.mark.parametrize("objective", FIGURE)
def test_it_beats_what_minimises_something_else(objective):
    problem = topic_problem(objective)
    ours = solve(problem, "pairwise", time_limit=20)
    assert ours.objective <= solve(problem, "exflow").parts[FIGURE[objective]] + 1e-12
    assert ours.objective < 0.9 * solve(problem, "eplb").parts[FIGURE[objective]]
    assert solve(problem, "auto", time_limit=20).objective <= ours.objective + 1e-12


@pytest.mark.parametrize("objective", FIGURE)
def test_a_cap_is_kept_and_costs_something(objective):
    problem = topic_problem(objective)
    free = solve(problem, "pairwise")
    cap = 1.0 + 0.4 * (capped_imbalance(free.parts) - 1.0)
    capped = solve(replace(problem, max_imbalance=cap), "pairwise")
    assert capped.status == "feasible"
    assert capped_imbalance(capped.parts) <= cap
    assert capped.objective >= free.objective - 1e-12


@pytest.mark.parametrize("objective", FIGURE)
def test_a_cap_is_kept_on_ranks_of_unlike_speed(objective):
    speed = np.array([0.6, 1.0, 1.0, 1.0])
    tokens = topic_tokens(1, num_tokens=300, num_layers=3, num_experts=16, top_k=2)
    problem = make_problem(tokens, 16, 4, 4, objective=objective, rank_speed=speed)
    free = solve(problem, "pairwise")
    assert capped_imbalance(free.parts) > 1.5
    assert solve(replace(problem, max_imbalance=1.1), "pairwise").status == "feasible"


def test_a_cap_that_nothing_keeps_is_said():
    tokens = np.zeros((40, 2, 1), np.int16)  # one expert has all the load
    problem = make_problem(tokens, 4, 2, 2, objective="affinity", max_imbalance=1.5)
    assert solve(problem, "pairwise").status == "infeasible"


def test_spare_slots_are_left_empty_and_nothing_is_proven_by_equal_ranks():
    problem = replace(topic_problem("coactivation"), slots_per_rank=5)
    result = solve(problem, "pairwise")
    assert (result.placement >= 0).sum() == 3 * 16
    assert "exact" not in result.notes


def test_relabelled_experts_are_worth_the_same_where_it_is_exact():
    problem = topic_problem("coactivation", experts=8, ranks=2)
    names = np.random.default_rng(0).permutation(8)
    other = replace(
        problem,
        load=problem.load[:, names],
        coactivation=problem.coactivation[:, names][:, :, names],
        affinity=problem.affinity[:, names][:, :, names],
        primary_affinity=None,
        tokens=None,
    )
    one, two = solve(problem, "pairwise"), solve(other, "pairwise")
    assert one.objective == pytest.approx(two.objective, abs=1e-12)


def test_what_it_does_not_know_is_refused_also_by_auto():
    problem = topic_problem("affinity")
    pinned = np.full((3, 16), -1)
    pinned[0, 0] = 3
    problem = replace(problem, pinned=pinned)
    for solver in ("pairwise", "auto"):
        with pytest.raises(ValueError, match="pinned"):
            solve(problem, solver)


def test_missing_arrays_are_named():
    problem = Problem(load=np.ones((1, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2)
    with pytest.raises(ValueError, match="coactivation"):
        solve(problem, "pairwise")
    with pytest.raises(ValueError, match="affinity between two layers"):
        solve(replace(problem, objective="affinity"), "pairwise")


def test_a_stopped_budget_gives_a_sound_placement_at_once():
    budget = Budget()
    budget.stop()
    problem = topic_problem("coactivation", max_imbalance=1.2)
    assert solve(problem, "pairwise", budget=budget).termination == "interrupted"


def test_tokens_that_use_one_expert_cut_no_pair_and_nothing_says_they_do():
    tokens = np.random.default_rng(0).integers(0, 4, (20, 2, 1)).astype(np.int16)
    problem = make_problem(tokens, 4, 2, 2, objective="coactivation")
    for solver in ("pairwise", "auto"):
        result = solve(problem, solver)
        assert (result.objective, result.status) == (0.0, "optimal")
    assert prove(problem, "coactivation_cut", None, Budget()) is None
    for bound in certify(problem, result.placement, Budget(effort=1.0), ["coactivation_cut"]):
        assert bound.lower_bound == 0.0

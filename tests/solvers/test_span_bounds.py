"""Bounds on span and messages by column generation: below every placement, and near the best."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import all_placements, make_problem, problems, random_placement, topic_tokens

from solvers import Budget, solve
from solvers.bounds import columns_kernels as kernels
from solvers.bounds.certifying import certify
from solvers.bounds.columns import Columns
from solvers.bounds.span import column_bounds
from solvers.bounds.token_sets import TokenSets
from solvers.check import check

SEEDS = st.integers(0, 2**32 - 1)
FIGURES = ("span", "messages_alltoall", "messages_coherent")
STOP = np.zeros(1, np.int64)


def proven(problem, placement):
    bounds = certify(problem, placement, Budget(), FIGURES)
    return {bound.figure: bound.lower_bound for bound in bounds}


@settings(max_examples=40, deadline=None)
@given(problems(max_experts=8, max_layers=2), SEEDS)
def test_no_bound_is_above_the_value_of_a_placement(problem, seed):
    rng = np.random.default_rng(seed)
    found = proven(problem, random_placement(problem, rng))
    assert set(found) == set(FIGURES)
    for _ in range(5):
        parts = check(problem, random_placement(problem, rng))
        for figure, bound in found.items():
            assert bound <= parts[figure] + 1e-9


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (4, 4), (6, 2), (6, 3)])
@pytest.mark.parametrize("homes", [True, False])
def test_no_bound_is_above_the_optimum_and_columns_come_close(num_experts, num_ranks, homes):
    rng = np.random.default_rng([num_experts, num_ranks])
    for _ in range(4):
        tokens = np.array([[rng.permutation(num_experts)[:3]] for _ in range(20)], np.int16)
        problem = make_problem(
            tokens,
            num_experts,
            num_ranks,
            num_experts // num_ranks,
            home=rng.integers(0, num_ranks, 20) if homes else None,
        )
        values = [check(problem, placement) for placement in all_placements(problem)]
        found = proven(problem, next(all_placements(problem)))
        for figure in FIGURES:
            best = min(parts[figure] for parts in values)
            assert found[figure] <= best + 1e-9
            if figure != "messages_coherent":
                assert found[figure] >= 0.94 * best


def test_clear_topics_are_proven_to_be_split_as_well_as_can_be():
    problem = make_problem(topic_tokens(0, num_layers=2, num_topics=4), 16, 4, 4)
    best = solve(problem, "local_search", seed=0)
    sums = column_bounds(problem, False, Budget())
    assert sums.sum() / (600 * 2) >= best.parts["span"] * (1 - 2e-3)
    assert sums.sum() / (600 * 2) <= best.parts["span"] + 1e-9


def test_columns_prove_far_more_than_room_for_pairs_does():
    tokens = topic_tokens(3, num_layers=1, num_experts=32, top_k=4, num_topics=8)
    home = np.arange(600) % 8
    problem = make_problem(tokens, 32, 8, 4, home=home)
    best = solve(problem, "local_search", seed=0)
    (bound,) = certify(problem, best.placement, Budget(), ["messages_alltoall"])
    assert bound.method == "column generation"
    assert bound.gap < 0.06
    assert (best.objective - best.lower_bound) / best.objective > 3 * bound.gap


def test_relabelling_experts_and_ranks_hardly_changes_what_is_proven():
    tokens = topic_tokens(1, num_layers=1)
    rng = np.random.default_rng(5)
    home = rng.integers(0, 4, len(tokens))
    problem = make_problem(tokens, 16, 4, 4, home=home)
    renamed = make_problem(rng.permutation(16)[tokens], 16, 4, 4, home=rng.permutation(4)[home])
    for by_home in (False, True):
        first, second = (column_bounds(p, by_home, Budget()) for p in (problem, renamed))
        assert first == pytest.approx(second, rel=5e-3)


def test_the_same_bound_twice():
    problem = make_problem(topic_tokens(2, num_layers=2), 16, 4, 4, home=np.arange(600) % 4)
    first, second = (column_bounds(problem, True, Budget()) for _ in range(2))
    assert (first == second).all()


def test_columns_prove_nothing_with_redundant_slots_or_without_time():
    problem = make_problem(topic_tokens(2, num_layers=1), 16, 4, 4)
    assert column_bounds(replace(problem, slots_per_rank=5), False, Budget()) is None
    assert np.isneginf(column_bounds(problem, False, Budget(0.0))).all()


@pytest.mark.parametrize("by_home", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_cheapest_set_is_found(by_home, size):
    rng = np.random.default_rng(size)
    num_experts, num_ranks = 12, 12 // size
    for _ in range(5):
        tokens = np.array([rng.permutation(num_experts)[:4] for _ in range(80)])
        tokens[rng.random(tokens.shape) < 0.2] = -1
        home = rng.integers(0, num_ranks, 80)
        sets = TokenSets.of(tokens, num_experts, home if by_home else None)
        start = np.arange(num_experts).reshape(num_ranks, size)
        columns = Columns(sets, start, by_home)
        price = rng.integers(0, 40, num_experts) / 2
        rank_price = rng.integers(0, 5, columns.kinds).astype(float)
        found, ranks = np.zeros((50, size), np.int64), np.zeros(50, np.int64)
        least, num_found, complete = kernels.cheapest_set(
            columns.order, price, rank_price, sets.experts, sets.home, sets.weight, columns.first,
            columns.users, columns.pairs, columns.at_home, size, 1e9, 10**9, STOP, found, ranks,
        )  # fmt: skip
        costs = {}
        for chosen in itertools.combinations(range(num_experts), size):
            touched = np.isin(tokens, chosen).any(axis=1)
            for rank in range(columns.kinds):
                cost = (touched & (home != rank)).sum() if by_home else touched.sum()
                costs[chosen, rank] = cost - price[list(chosen)].sum() - rank_price[rank]
        assert complete
        assert least == min(costs.values())
        last = num_found - 1
        assert costs[tuple(sorted(found[last].tolist())), int(ranks[last])] == least


def test_a_search_that_is_cut_short_proves_nothing():
    tokens = topic_tokens(4, num_layers=1)[:, 0]
    columns = Columns(TokenSets.of(tokens, 16), np.arange(16).reshape(4, 4), False, max_work=10)
    steps = 0
    while not columns.done:
        columns.step(STOP)
        steps += 1
    assert 1 < steps < 10
    assert columns.best == -np.inf

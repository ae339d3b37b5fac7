"""Sem-MoE and SGLang's topology-aware placement: experts near the tokens that use them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, problems, topic_tokens

from solvers import Budget, solve
from solvers.published.sem_moe import CoClustering
from solvers.published.sglang_topology import uses_by_home


def test_tokens_go_to_the_rank_that_has_most_of_their_experts():
    tokens = np.array([[[0, 1], [0, 2]], [[2, 3], [3, -1]], [[0, 3], [-1, -1]]])
    clustering = CoClustering(tokens, 4, 2)
    ranks = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    met = clustering.met(ranks)
    assert met.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    assert clustering.place_tokens(met).tolist() == [0, 1, 0]
    # sizes 2 and 1: 1/2 away each; the third token activates half of its experts elsewhere
    cost = clustering.cost(ranks, np.array([0, 1, 0]))
    assert cost == pytest.approx((0.5 * 1.0 + 0.5 * 0.5) / 3)


def test_a_full_rank_gives_up_the_tokens_that_lose_least():
    """Six of eight want rank 0; leaving costs them 0.2, 0.4, ..., and brings 2 of balance."""
    clustering = CoClustering(np.zeros((8, 1, 1), np.int64), 2, 2)
    gain = np.array([1.2, 1.0, 0.8, 0.6, 0.4, 0.2, -0.5, -0.5])
    met = np.stack([gain, np.zeros(8)], axis=1)
    assert clustering.place_tokens(met).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), per_rank=st.integers(1, 12), num_ranks=st.integers(1, 5))
def test_homes_are_even_since_balance_is_worth_more_than_any_token(seed, per_rank, num_ranks):
    """Leaving a full rank for an emptier one brings 2; no token has more than 1 to lose.

    Where the ranks do not divide the tokens it may bring less.
    """
    num_tokens = per_rank * num_ranks
    clustering = CoClustering(np.zeros((num_tokens, 1, 1), np.int64), num_ranks, num_ranks)
    met = np.random.default_rng(seed).dirichlet(np.full(num_ranks, 0.2), num_tokens)
    size = np.bincount(clustering.place_tokens(met), minlength=num_ranks)
    assert (size == per_rank).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_half_of_the_alternation_is_best_for_the_other(seed):
    """Experts by brute force; tokens by exchanging any one of them."""
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(4)[:2] for _ in range(6)])[:, None, :]
    clustering = CoClustering(tokens, 4, 2)
    homes = rng.integers(0, 2, 6)
    cost = clustering.cost(clustering.place_experts(homes), homes)
    for chosen in itertools.combinations(range(4), 2):
        ranks = np.ones((1, 4), np.int64)
        ranks[0, list(chosen)] = 0
        assert cost <= clustering.cost(ranks, homes) + 1e-12
    ranks = rng.permuted(np.array([[0, 0, 1, 1]]), axis=1)
    homes = clustering.place_tokens(clustering.met(ranks))
    for token in range(6):
        moved = homes.copy()
        moved[token] = 1 - moved[token]
        assert clustering.cost(ranks, homes) <= clustering.cost(ranks, moved) + 1e-12


def test_alternating_never_costs_more_and_finds_topics():
    problem = make_problem(topic_tokens(2, top_k=3), 16, 4, 4)
    clustering = CoClustering(problem.tokens.astype(np.int64), 16, 4)
    rng = np.random.default_rng(0)
    costs = [clustering.run(rng, Budget())[0] for _ in range(3)]
    assert max(costs) < 0.5 * 0.75  # random places are met in one of four cases
    sem, contiguous = solve(problem, "sem_moe").parts, solve(problem, "contiguous").parts
    assert sem["messages_alltoall"] < 0.7 * contiguous["messages_alltoall"]


def test_experts_go_where_their_tokens_are_at_home_heaviest_first():
    """Expert 0 is used most, at home 1; 1 wants to go there too, but after 0 and 2 it is full."""
    uses = {(1, 0): 6, (1, 2): 5, (1, 1): 4, (0, 3): 2, (1, 3): 1}
    rows = [(home, expert) for (home, expert), n in uses.items() for _ in range(n)]
    home, experts = np.array(rows).T
    problem = make_problem(experts[:, None, None].astype(np.int16), 4, 2, 2, home=home)
    assert uses_by_home(problem, 0).tolist() == [[0, 0, 0, 2], [6, 4, 5, 1]]
    assert solve(problem, "sglang_topology").placement.tolist() == [[1, 3, 0, 2]]


def test_a_price_between_nodes_and_measured_links_are_seen():
    """Experts 0 and 1 take their tokens' homes 0 and 2; most of 2's tokens are at home on 2."""
    home = np.array([0, 0, 0, 0, 2, 2, 2, 0, 2, 2])
    experts = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    problem = make_problem(
        experts[:, None, None].astype(np.int16), 4, 4, 1, home=home, ranks_per_node=2,
        node_weight=4.0,
    )  # fmt: skip
    assert solve(problem, "sglang_topology").placement.tolist() == [[0, 3, 1, 2]]
    far = np.ones((4, 4)) - np.eye(4)
    far[2, 3] = 9.0
    measured = replace(problem, node_weight=0.0, link_cost=far)
    assert solve(measured, "sglang_topology").placement.tolist() == [[0, 2, 1, 3]]


@settings(max_examples=60, deadline=None)
@given(problems(max_spare=2), st.sampled_from(["sem_moe", "sglang_topology"]), st.integers(0, 9))
def test_placements_are_sound_and_repeat_themselves(problem, solver, seed):
    if problem.home is None:
        problem = replace(problem, home=np.arange(len(problem.tokens)) % problem.num_ranks)
    first, second = solve(problem, solver, seed), solve(problem, solver, seed)
    assert first.placement.tobytes() == second.placement.tobytes()

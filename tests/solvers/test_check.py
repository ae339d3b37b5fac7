"""The checker against a second implementation, hand-made cases, and symmetries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, problems, random_placement, reference, topic_tokens

from solvers import Problem, solve
from solvers.check import check, num_tokens, objective

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(problems(), SEEDS)
def test_every_figure_is_that_of_the_reference(problem, seed):
    placement = random_placement(problem, np.random.default_rng(seed))
    figures = check(problem, placement)
    expected = reference(problem, placement)
    assert set(figures) == set(expected)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(problems(), SEEDS)
def test_renaming_experts_changes_no_figure(problem, seed):
    rng = np.random.default_rng(seed)
    placement = random_placement(problem, rng)
    new_name = rng.permutation(problem.num_experts)
    old_name = np.argsort(new_name)

    def rename(ids):
        return np.where(ids >= 0, new_name[ids], -1)

    renamed = replace(
        problem,
        load=problem.load[:, old_name],
        coactivation=problem.coactivation[:, old_name][:, :, old_name],
        affinity=problem.affinity[:, old_name][:, :, old_name],
        primary_affinity=problem.primary_affinity[:, old_name][:, :, old_name],
        tokens=rename(problem.tokens),
        primary=None if problem.primary is None else rename(problem.primary),
    )
    assert check(renamed, rename(placement)) == pytest.approx(check(problem, placement), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems(), SEEDS)
def test_renaming_nodes_and_the_ranks_of_a_node_changes_no_figure(problem, seed):
    rng = np.random.default_rng(seed)
    placement = random_placement(problem, rng)
    for row in placement:  # among equally loaded copies the lower rank serves: its name matters
        held = row[row >= 0]
        assume(len(set(held.tolist())) == held.size)
    shape = (problem.num_nodes, problem.ranks_per_node)
    old_rank = rng.permuted(np.arange(problem.num_ranks).reshape(shape), axis=1)
    old_rank = rng.permutation(old_rank).ravel()
    by_rank = placement.reshape(problem.num_layers, problem.num_ranks, -1)
    moved = by_rank[:, old_rank].reshape(placement.shape)
    if problem.home is None and problem.dispatch == "coherent":
        problem = replace(problem, dispatch="alltoall")
    home = None if problem.home is None else np.argsort(old_rank)[problem.home]
    figures = check(replace(problem, home=home), moved)
    expected = check(problem, placement)
    if problem.home is None:  # a token without experts in the first layer is taken to be on rank 0
        del figures["messages_coherent"], expected["messages_coherent"]
    assert figures == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([[0, 1, 2, 3]], "expected \\(2, 4\\)"),
        ([[0, 1, 2, 3], [0, 1, 2, 2]], "rank 1 holds expert 2 twice"),
        ([[0, 1, 2, 0], [0, 1, 2, 3]], "layer 0: no slot holds expert 3"),
        ([[0, 1, 2, -1], [0, 1, 2, 3]], "no slot holds expert 3"),
        ([[0, 1, 2, 4], [0, 1, 2, 3]], "expected -1..3"),
        ([[0, 1, 2, -2], [0, 1, 2, 3]], "expected -1..3"),
    ],
)
def test_unsound_placements_are_refused(placement, message):
    problem = Problem(load=np.ones((2, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2)
    with pytest.raises(ValueError, match=message):
        check(problem, np.array(placement))


def test_placements_of_floats_are_refused():
    problem = Problem(load=np.ones((1, 2)), num_ranks=2, slots_per_rank=1, ranks_per_node=2)
    with pytest.raises(ValueError, match="integers"):
        check(problem, np.array([[0.0, 1.0]]))


def test_figures_of_a_case_small_enough_to_count_by_hand():
    tokens = np.array([[[0, 1], [0, 2]], [[2, 3], [1, -1]]])
    problem = make_problem(tokens, 4, 2, 2, home=np.array([0, 0]), ranks_per_node=1)
    figures = check(problem, np.array([[0, 1, 2, 3], [0, 1, 2, 3]]))
    assert figures["span"] == (1 + 2 + 1 + 1) / 4
    assert figures["messages_alltoall"] == (0 + 1 + 1 + 0) / 4
    # the first token stays on rank 0, from where the second layer sends to rank 1 and back; the
    # second moves to rank 1 and from there to rank 0
    assert figures["messages_coherent"] == (0 + 2 + 1 + 1) / 4
    assert figures["node_messages"] == figures["messages_alltoall"]
    assert figures["cross_rank_fraction"] == (0.5 + 1) / 2
    assert figures["imbalance"] == (1 + 4 / 3) / 2
    assert figures["coactivation_cut"] == 1 / 3


def test_a_copy_at_home_serves_before_one_on_a_used_rank_before_the_least_loaded():
    # expert 0 on ranks 0, 1 and 2; 1 on rank 1, 2 on rank 2; rank 2 has most load, rank 0 least
    load = np.array([[3.0, 4.0, 9.0]])
    placement = np.array([[0, -1, 0, 1, 0, 2]])

    def ranks(experts, home):
        tokens = np.array([[experts]])
        problem = Problem(
            load=load, num_ranks=3, slots_per_rank=2, ranks_per_node=3, tokens=tokens,
            home=np.array([home]),
        )  # fmt: skip
        figures = check(problem, placement)
        return figures["span"], figures["messages_alltoall"]

    assert ranks([0, -1], 2) == (1, 0)  # at home
    assert ranks([0, 1], 2) == (2, 1)  # at home although rank 1 is used
    assert ranks([0, 1], 1) == (1, 0)
    load = np.array([[3.0, 4.0, 9.0]])
    assert ranks([1, -1], 0) == (1, 1)
    placement = np.array([[-1, -1, 0, 1, 0, 2]])
    assert ranks([0, 2], 0) == (1, 1)  # on rank 2, which is used, although rank 1 has less load


def test_objectives_are_made_of_their_parts():
    tokens = topic_tokens(0, num_tokens=50)
    problem = make_problem(
        tokens, 16, 4, 4, ranks_per_node=2, home=np.arange(50) % 4, node_weight=3.0,
        latency_load_us=0.5, latency_message_us=2.0,
    )  # fmt: skip
    parts = check(problem, np.tile(np.arange(16), (6, 1)))
    traffic = parts["messages_alltoall"] + 3.0 * parts["node_messages"]
    assert objective(problem, parts) == traffic
    assert objective(replace(problem, objective="balance"), parts) == parts["imbalance"]
    assert num_tokens(problem) == 50
    latency = 0.5 * parts["max_rank_load"] + 2.0 * traffic * 50 / 4
    assert objective(replace(problem, objective="latency"), parts) == pytest.approx(latency)
    coherent = replace(problem, dispatch="coherent")
    parts = check(coherent, np.tile(np.arange(16), (6, 1)))
    expected = parts["messages_coherent"] + 3.0 * parts["node_messages"]
    assert objective(coherent, parts) == expected
    assert objective(replace(problem, dispatch="allgather"), parts) == 3 + 3.0


def test_latency_counts_the_tokens_of_the_load_not_those_of_the_sample():
    tokens = topic_tokens(0, num_tokens=40)
    problem = make_problem(tokens, 16, 4, 4)
    sample = replace(problem, tokens=tokens[:10], load=problem.load * 7)
    assert num_tokens(sample) == pytest.approx(280)
    assert num_tokens(replace(sample, tokens=None)) == pytest.approx(280)


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_without_tokens_the_pairwise_figures_order_placements_as_the_exact_ones_do(dispatch):
    tokens = topic_tokens(1, num_tokens=400, num_experts=20)
    problem = make_problem(tokens, 20, 4, 5, ranks_per_node=2, dispatch=dispatch, node_weight=1.0)
    rough = replace(problem, tokens=None)
    exact_values, rough_values = [], []
    for name in ("contiguous", "round_robin", "random", "exflow"):
        placement = solve(problem, name).placement
        exact_values.append(objective(problem, check(problem, placement)))
        parts = check(rough, placement)
        assert "span" not in parts
        rough_values.append(objective(rough, parts))
    assert rough_values == pytest.approx(exact_values, rel=0.1)
    assert np.argmin(rough_values) == np.argmin(exact_values) == 3


def test_pairwise_figures_are_exact_when_all_pairs_or_none_are_kept():
    tokens = np.array([[[0, 1]], [[2, 3]], [[0, 1]]])
    problem = make_problem(tokens, 4, 2, 2)
    rough = replace(problem, tokens=None)
    for placement in ([[0, 1, 2, 3]], [[0, 2, 1, 3]]):
        exact, estimate = check(problem, np.array(placement)), check(rough, np.array(placement))
        assert estimate["span_pairwise"] == exact["span"]
        assert estimate["messages_pairwise"] == exact["messages_alltoall"]


def test_traffic_without_tokens_and_pairs_says_what_is_missing():
    problem = Problem(load=np.ones((1, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2)
    with pytest.raises(ValueError, match="needs tokens or coactivation"):
        objective(problem, check(problem, np.arange(4)[None]))

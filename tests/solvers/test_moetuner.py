"""MoETuner's two programs against brute force, with every back end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, problems, topic_tokens

from solvers import Budget, solve
from solvers.integer_program import BACKENDS
from solvers.published.moetuner import Labelling, balanced_clusters


def unevenness(load, clusters, num_clusters):
    totals = np.bincount(clusters, load, minlength=num_clusters)
    return np.abs(totals - load.sum() / num_clusters).sum()


def least_unevenness(load, num_clusters, most):
    found = []
    for clusters in itertools.product(range(num_clusters), repeat=load.size):
        size = np.bincount(clusters, minlength=num_clusters)
        if size.max() <= most and (size.min() > 0 or load.size < num_clusters):
            found.append(unevenness(load, np.array(clusters), num_clusters))
    return min(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clusters_are_balanced_where_greedy_packing_is_not(backend):
    """Heaviest first gives 5 3 3 and 4 3; with three to a cluster 9 and 9 is possible."""
    load = np.array([5.0, 4, 3, 3, 3])
    clusters, proved = balanced_clusters(load, 2, 3, backend, 5.0, Budget())
    assert proved
    assert unevenness(load, clusters, 2) == 0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), num_experts=st.integers(2, 7),
    num_clusters=st.integers(2, 3), spare=st.integers(0, 2),
)  # fmt: skip
def test_clusters_are_as_even_as_brute_force_finds(seed, num_experts, num_clusters, spare):
    load = np.random.default_rng(seed).integers(0, 100, num_experts).astype(float)
    load *= 100 / max(load.sum(), 1)  # so that the program's units lose nothing
    load = np.round(load)
    load[0] += 100 - load.sum()
    most = -(-num_experts // num_clusters) + spare
    clusters, proved = balanced_clusters(load, num_clusters, most, "cp_sat", 5.0, Budget())
    best = least_unevenness(load, num_clusters, most)
    assert proved
    assert unevenness(load, clusters, num_clusters) == pytest.approx(best, abs=0.05)
    size = np.bincount(clusters, minlength=num_clusters)
    assert size.max() <= most
    assert size.min() > 0 or num_experts < num_clusters


def all_labels(num_layers, num_ranks):
    orders = [np.array(order) for order in itertools.permutations(range(num_ranks))]
    for labels in itertools.product(orders, repeat=num_layers):
        yield np.stack(labels)


def node_costs(num_ranks, ranks_per_node, price):
    node = np.arange(num_ranks) // ranks_per_node
    cost = 1.0 + price * (node[:, None] != node)
    return cost - np.diag(np.diag(cost))


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_make_the_busiest_link_as_idle_as_brute_force_does(backend):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        cost = rng.uniform(1, 5, (3, 3)) * (1 - np.eye(3))
        labelling = Labelling(rng.gamma(0.5, size=(2, 3, 3)), cost, np.full((3, 3), 2))
        best = min(labelling.worst(labels).sum() for labels in all_labels(3, 3))
        labels, program = labelling.solve(backend, Budget())
        assert program == "optimal"
        assert labelling.worst(labels).sum() == pytest.approx(best, abs=3.0)  # of 10,000


def test_exchanging_labels_finds_what_nodes_need():
    for seed in range(5):
        flow = np.random.default_rng(seed).gamma(0.5, size=(2, 4, 4))
        labelling = Labelling(flow, node_costs(4, 2, 3.0), np.full((3, 4), 2))
        start = labelling.start()
        better = labelling.exchange(start, Budget())
        best = min(labelling.worst(labels).sum() for labels in all_labels(3, 4))
        assert best <= labelling.worst(better).sum() <= labelling.worst(start).sum()
        assert labelling.worst(better).sum() <= 1.25 * best


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(2, 4))
def test_without_nodes_the_first_labels_are_already_the_best(seed, num_ranks):
    flow = np.random.default_rng(seed).gamma(0.5, size=(1, num_ranks, num_ranks))
    labelling = Labelling(flow, node_costs(num_ranks, num_ranks, 0.0), np.ones((2, num_ranks), int))
    best = min(labelling.worst(labels).sum() for labels in all_labels(2, num_ranks))
    assert labelling.worst(labelling.start()).sum() == pytest.approx(best)


def test_the_largest_flows_stay_on_their_rank():
    """9 and 8 cannot both stay, they leave the same cluster: 8 is the bottleneck."""
    flow = np.array([[[9.0, 8, 0], [0, 7, 1], [2, 0, 3]]])
    labelling = Labelling(flow, node_costs(3, 3, 0.0), np.ones((2, 3), int))
    labels = labelling.start()
    assert labels.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert labelling.worst(labels).tolist() == pytest.approx([8 / 9 * 10_000])


def test_ranks_hold_equally_many_experts_over_all_layers():
    """Clusters of 3 and 1 in every layer; flow would keep the large ones on one rank."""
    flow = np.tile(np.array([[5.0, 1], [2, 4]]), (3, 1, 1))
    labelling = Labelling(flow, node_costs(2, 2, 0.0), np.tile([3, 1], (4, 1)))
    assert labelling.held(labelling.start()).tolist() == [12, 4]
    labels, program = labelling.solve("cp_sat", Budget())
    assert labelling.held(labels).tolist() == [8, 8]
    assert program == "optimal"
    # one change of sides is enough, and costs 4 and then 5: 2, 2 become 5 once
    assert labelling.worst(labels).sum() == pytest.approx((2 + 5 + 2) / 5 * 10_000)


def test_on_hidden_topics_load_is_balanced_better_than_greedily():
    tokens = topic_tokens(0, num_layers=3, num_experts=12, top_k=2)
    problem = make_problem(tokens, 12, 3, 4)
    result = solve(problem, "moetuner")
    assert result.parts["imbalance"] <= solve(problem, "eplb").parts["imbalance"]
    assert result.notes["balanced"] >= 1
    assert solve(problem, "moetuner").placement.tobytes() == result.placement.tobytes()


@settings(max_examples=15, deadline=None)
@given(problems(max_experts=6, max_ranks=3))
def test_placements_are_sound(problem):
    result = solve(problem, "moetuner")
    copies = np.bincount(result.placement[result.placement >= 0], minlength=problem.num_experts)
    assert (copies == problem.num_layers).all()

"""Occult and GRACE-MoE: co-activated experts together, worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, problems, topic_tokens

from solvers import solve
from solvers.packing import place_groups
from solvers.published import grace_moe, occult
from solvers.spectral import spectral_clusters


def symmetric(num_experts, pairs):
    """[E, E] with the given weights, 0 elsewhere."""
    together = np.zeros((num_experts, num_experts))
    for (i, j), weight in pairs.items():
        together[i, j] = together[j, i] = weight
    return together


def test_occult_starts_with_the_strongest_pair_and_goes_on_far_from_it():
    """2 and 3 come first; of the others, 0 has least to do with them; 5 is closer to it than 1."""
    together = symmetric(6, {(2, 3): 9, (1, 2): 4, (4, 3): 3, (0, 5): 2, (0, 1): 1, (5, 3): 1})
    np.fill_diagonal(together, 50)  # what an expert does with itself does not count
    assert occult.collect(together, [2, 2, 2]).tolist() == [1, 2, 0, 0, 2, 1]


def test_occult_fills_a_device_by_mean_collaboration():
    together = symmetric(6, {(0, 1): 9, (0, 2): 5, (1, 3): 4, (1, 2): 0, (0, 3): 3, (4, 5): 1})
    assert occult.collect(together, [3, 3]).tolist() == [0, 0, 1, 0, 1, 1]


def test_groups_are_laid_out_rank_by_rank():
    groups = np.array([[1, 0, 1, 2], [2, 2, 0, 0]])
    assert place_groups(groups, 3, 2).tolist() == [[1, -1, 0, 2, 3, -1], [2, 3, -1, -1, 0, 1]]


@pytest.mark.parametrize("num_clusters", [1, 2, 3, 4])
def test_spectral_clustering_finds_blocks(num_clusters):
    rng = np.random.default_rng(num_clusters)
    blocks = rng.permutation(np.arange(24) % num_clusters)
    affinity = np.where(blocks[:, None] == blocks, 5.0, 0.05) + rng.random((24, 24)) * 0.1
    affinity = affinity + affinity.T
    np.fill_diagonal(affinity, 0)
    found = spectral_clusters(affinity, num_clusters, np.random.default_rng(0))
    assert len(set(zip(found.tolist(), blocks.tolist(), strict=True))) == num_clusters


@pytest.mark.parametrize("noise", [1, 2, 3])
def test_rounding_of_eigenvectors_decides_nothing(noise, monkeypatch):
    """Processors round differently; an expert that no token chose has no direction to round."""
    rng = np.random.default_rng(noise)
    affinity = rng.integers(0, 3, (20, 20)).astype(float)
    affinity = affinity + affinity.T
    np.fill_diagonal(affinity, 0)
    affinity[[3, 17]] = affinity[:, [3, 17]] = 0

    def clusters():
        return spectral_clusters(affinity, 4, np.random.default_rng(0)).tolist()

    exact = clusters()
    eigh = np.linalg.eigh

    def rounded(matrix):
        values, vectors = eigh(matrix)
        return values, vectors + 1e-15 * rng.standard_normal(vectors.shape)

    monkeypatch.setattr(np.linalg, "eigh", rounded)
    assert [clusters() for _ in range(5)] == [exact] * 5


def test_spectral_clustering_of_nothing_is_sound():
    for num_items, num_clusters in itertools.product(range(1, 6), range(1, 6)):
        affinity = np.zeros((num_items, num_items))
        found = spectral_clusters(affinity, num_clusters, np.random.default_rng(0))
        assert found.shape == (num_items,)
        assert 0 <= found.min() <= found.max() < num_clusters


def test_grace_sends_the_weakest_of_a_large_group_to_where_they_have_most_affinity():
    """Group 0 holds four and may keep three: 3 is the weakest in it and fits group 1 best."""
    pairs = {(0, 1): 5, (0, 2): 5, (1, 2): 5, (0, 3): 1, (3, 4): 2, (4, 5): 3}
    groups = grace_moe.bound_sizes(symmetric(6, pairs), np.array([0, 0, 0, 0, 1, 1]), 2, 1, 3)
    assert groups.tolist() == [0, 0, 0, 1, 1, 1]


def test_grace_fills_a_small_group_with_what_others_miss_least():
    pairs = {(0, 1): 5, (0, 2): 5, (1, 2): 5, (0, 3): 1, (4, 5): 9}
    groups = grace_moe.bound_sizes(symmetric(6, pairs), np.array([0, 0, 0, 0, 1, 1]), 3, 1, 4)
    assert groups.tolist() == [0, 0, 0, 2, 1, 1]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), num_items=st.integers(1, 12), num_groups=st.integers(1, 5),
    spread=st.integers(0, 3),
)  # fmt: skip
def test_grace_group_sizes_stay_within_their_limits(seed, num_items, num_groups, spread):
    rng = np.random.default_rng(seed)
    affinity = rng.random((num_items, num_items))
    low, high = max(0, num_items // num_groups - spread), -(-num_items // num_groups) + spread
    groups = rng.integers(0, num_groups, num_items)
    size = np.bincount(
        grace_moe.bound_sizes(affinity, groups, num_groups, low, high), minlength=num_groups
    )
    assert low <= size.min() <= size.max() <= high


def test_grace_knee_is_farthest_above_the_chord():
    assert grace_moe.knee([(0.0, 0.2), (1.0, 0.6), (2.0, 0.7), (4.0, 0.8)]) == 1
    assert grace_moe.knee([(0.0, 0.5), (0.0, 0.5)]) == 0


def test_grace_replicates_the_hot_experts_of_the_busiest_rank():
    """Loads 12, 3, 1, 4 (mean 5): rho = 2.4, so 2 replicas of what carries 12 x 2/3 = 8."""
    load = np.array([6.0, 3, 3, 2, 1, 1, 0, 4])
    table = np.array([[0, 1, 2, -1], [3, 4, -1, -1], [5, 6, -1, -1], [7, -1, -1, -1]])
    assert grace_moe.replicate_hot(table, load) == 4
    assert table.tolist() == [[0, 1, 2, -1], [3, 4, 0, 1], [5, 6, 0, 1], [7, -1, -1, -1]]


def test_grace_without_spare_slots_groups_evenly_and_replicates_nothing():
    problem = make_problem(topic_tokens(1, top_k=3), 16, 4, 4, ranks_per_node=2)
    result = solve(problem, "grace_moe")
    assert result.notes["replicas"] == 0
    assert (result.placement >= 0).all()


def test_grace_keeps_topics_on_a_node():
    problem = make_problem(topic_tokens(1, top_k=3), 16, 4, 5, ranks_per_node=2)
    grace, contiguous = solve(problem, "grace_moe").parts, solve(problem, "contiguous").parts
    assert grace["node_messages"] < 0.8 * contiguous["node_messages"]
    assert grace["coactivation_cut"] < 0.8 * contiguous["coactivation_cut"]


@settings(max_examples=60, deadline=None)
@given(problems(max_spare=3), st.sampled_from(["occult", "grace_moe"]), st.integers(0, 9))
def test_groupings_are_sound_and_repeat_themselves(problem, solver, seed):
    first, second = solve(problem, solver, seed), solve(problem, solver, seed)
    assert first.placement.tobytes() == second.placement.tobytes()

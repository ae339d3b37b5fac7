"""Load skew by its definitions; the balance bound never exceeds the best placement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity import balance_bound, load_skew


def test_skew_of_one_layer_by_hand():
    skew = load_skew(np.array([[0, 10, 30, 0], [5, 5, 5, 5]]))
    np.testing.assert_allclose(skew.max_over_mean, [3.0, 1.0])
    np.testing.assert_allclose(skew.coefficient_of_variation, [np.sqrt(1.5), 0.0])
    np.testing.assert_allclose(skew.hottest_share, [0.75, 0.25])
    np.testing.assert_array_equal(skew.never_used, [2, 0])
    np.testing.assert_allclose(skew.gini, [0.625, 0.0])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any))
@settings(deadline=None)
def test_gini_is_half_the_relative_mean_difference(loads):
    load = np.array([loads])
    difference = np.abs(load[0][:, None] - load[0][None, :]).mean()
    np.testing.assert_allclose(load_skew(load).gini[0], difference / (2 * load.mean()), atol=1e-12)


def test_a_layer_without_tokens_has_no_skew():
    skew = load_skew(np.zeros((1, 4), np.int64))
    assert np.isnan(skew.max_over_mean[0])
    assert np.isnan(skew.gini[0])
    assert skew.never_used[0] == 4


def best_imbalance(load, num_ranks):
    """By trying every assignment with at most ceil(E / G) experts per rank."""
    capacity = -(-len(load) // num_ranks)
    best = np.inf
    for ranks in itertools.product(range(num_ranks), repeat=len(load)):
        if np.bincount(ranks).max() <= capacity:
            best = min(best, np.bincount(ranks, load).max())
    return best / (sum(load) / num_ranks)


@given(
    load=st.lists(st.integers(0, 50), min_size=2, max_size=7).filter(any),
    num_ranks=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_the_balance_bound_never_exceeds_the_best_placement(load, num_ranks):
    bound = balance_bound(np.array([load]), num_ranks)[0]
    assert bound <= best_imbalance(load, num_ranks) + 1e-9
    assert bound >= 1


@pytest.mark.parametrize(
    ("load", "num_ranks", "expected"),
    [
        ([10, 1, 1, 0], 2, 10 / 6),  # the hottest expert and the coolest one that joins it
        ([6, 6, 6, 0, 0, 0], 2, 12 / 9),  # two of the three hottest share a rank
        ([6, 5, 4, 4, 3, 2], 3, 8 / 8),  # the mean
        ([6, 6, 6, 6, 6, 6, 0, 0, 0, 0, 0, 0], 4, 12 / 9),
    ],
)
def test_the_balance_bound_is_met_where_one_of_its_arguments_decides(load, num_ranks, expected):
    np.testing.assert_allclose(balance_bound(np.array([load]), num_ranks), [expected])
    if len(load) <= 6:
        np.testing.assert_allclose(best_imbalance(load, num_ranks), expected)

"""Headroom: bounds hold for every placement, and the random placement is averaged exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from placer.affinity import count, headroom, random_span

from .reference import random_trace


def placements(num_experts, num_ranks):
    """Every assignment of experts to ranks, with at most ceil(E / G) per rank."""
    capacity = -(-num_experts // num_ranks)
    for ranks in itertools.product(range(num_ranks), repeat=num_experts):
        if np.bincount(ranks).max() <= capacity:
            yield np.array(ranks)


def spans(trace, ranks):
    chosen = [[e for e in token if e >= 0] for token in trace.experts[:, 0].tolist()]
    return np.mean([len(set(ranks[token].tolist())) for token in chosen if token])


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (5, 2), (6, 3)])
def test_no_placement_is_better_than_the_bounds(num_experts, num_ranks):
    trace = random_trace(
        7, num_layers=2, num_experts=num_experts, top_k=3, num_tokens=15, variable_k=True
    )
    counts = count(trace)
    found = headroom(counts, num_ranks)
    every = list(placements(num_experts, num_ranks))
    assert min(spans(trace, ranks) for ranks in every) >= found.span_bound[0] - 1e-12

    best_affinity = best_primary = 0.0
    for here, there in itertools.product(every, every):
        inside = here[:, None] == there[None, :]
        best_affinity = max(best_affinity, counts.affinity[0][inside].sum())
        best_primary = max(best_primary, counts.primary_pairs[0][inside].sum())
    assert best_affinity / counts.affinity[0].sum() <= found.affinity_bound[0] + 1e-12
    assert best_primary / counts.primary_pairs[0].sum() <= found.primary_bound[0] + 1e-12


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (6, 3), (6, 2)])
def test_span_of_a_random_placement_is_the_mean_over_placements(num_experts, num_ranks):
    trace = random_trace(
        1, num_layers=1, num_experts=num_experts, top_k=3, num_tokens=10, variable_k=True
    )
    mean = np.mean([spans(trace, ranks) for ranks in placements(num_experts, num_ranks)])
    np.testing.assert_allclose(headroom(count(trace), num_ranks).span_random, [mean])


def test_random_span_where_ranks_hold_different_numbers_of_experts():
    assert random_span(5, 1, 2) == pytest.approx(1)
    assert random_span(5, 5, 2) == pytest.approx(2)
    assert random_span(3, 2, 2) == pytest.approx(1 + 2 / 3)
    assert np.isnan(random_span(3, 4, 2))


def test_one_rank_has_everything_and_one_expert_per_rank_spreads_everything():
    counts = count(random_trace(num_experts=6, top_k=3))
    one = headroom(counts, 1)
    np.testing.assert_allclose(one.affinity_bound, 1)
    np.testing.assert_allclose(one.span_random, 1)
    each = headroom(counts, 6)
    np.testing.assert_allclose(each.span_bound, 3)
    np.testing.assert_allclose(each.span_random, 3)
    hottest = counts.load.max(axis=1) / counts.load.mean(axis=1)
    np.testing.assert_allclose(each.imbalance_bound, hottest)

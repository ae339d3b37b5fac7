"""The transport kernel against a general assignment solver, and the chain against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Budget
from solvers.assignment import assign
from solvers.chain import (
    Effort,
    _match_labels,
    contiguous_ranks,
    effort_for,
    keep_flow,
    kept_flow,
)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(1, 12),
    num_ranks=st.integers(1, 6),
    spare=st.integers(0, 3),
    kind=st.sampled_from(["real", "ties", "negative", "huge", "tiny"]),
)
def test_transport_is_solved_exactly(seed, num_experts, num_ranks, spare, kind):
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    extra = rng.multinomial(spare, np.full(num_ranks, 1 / num_ranks))
    capacity = rng.multinomial(num_experts, rng.dirichlet(np.ones(num_ranks))) + extra
    profit = {
        "real": rng.gamma(0.3, size=(num_experts, num_ranks)),
        "ties": rng.integers(0, 3, (num_experts, num_ranks)).astype(float),
        "negative": rng.normal(size=(num_experts, num_ranks)),
        "huge": rng.gamma(0.3, size=(num_experts, num_ranks)) * 1e9,
        "tiny": rng.gamma(0.3, size=(num_experts, num_ranks)) * 1e-9,
    }[kind]
    rank = assign(profit, capacity)
    assert (np.bincount(rank, minlength=num_ranks) <= capacity).all()
    columns = np.repeat(np.arange(num_ranks), capacity)
    rows, chosen = linear_sum_assignment(profit[:, columns], maximize=True)
    best = profit[rows, columns[chosen]].sum()
    value = profit[np.arange(num_experts), rank].sum()
    assert value == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(profit).max())


def partitions(sizes):
    """Every row [E] of ranks with the given sizes."""
    return set(itertools.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist()))


@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (3, 1), (2, 2, 1), (1, 1, 1), (2, 0)])
def test_a_chain_is_solved_to_the_optimum_where_it_can_be_enumerated(sizes):
    num_experts, rows = sum(sizes), partitions(sizes)
    for seed in range(6):
        flow = np.random.default_rng(seed).gamma(0.4, size=(2, num_experts, num_experts))
        best = max(
            kept_flow(flow, np.array(ranks)) for ranks in itertools.product(sorted(rows), repeat=3)
        )
        effort = effort_for(3, num_experts, len(sizes))
        ranks = keep_flow(flow, np.array(sizes), np.random.default_rng(0), Budget(), effort)
        assert tuple(ranks[0].tolist()) in rows
        assert kept_flow(flow, ranks) == pytest.approx(best, rel=1e-12)


def test_kept_flow_counts_what_stays():
    flow = np.arange(8.0).reshape(2, 2, 2)
    assert kept_flow(flow, np.array([[0, 1], [0, 1], [1, 0]])) == (0 + 3) + (5 + 6)


def test_recombination_beats_the_best_of_its_starts_and_windows_beat_that():
    flow = np.random.default_rng(5).gamma(0.2, size=(11, 24, 24))
    sizes = np.full(6, 4)

    def value(effort):
        ranks = keep_flow(flow, sizes, np.random.default_rng(0), Budget(), effort)
        return kept_flow(flow, ranks)

    one, many, rounds = value(Effort(0, 0, 0)), value(Effort(12, 0, 0)), value(Effort(12, 6, 6))
    assert one < many * 0.99
    assert many < rounds


def test_a_spent_budget_gives_the_contiguous_placement():
    flow = np.random.default_rng(0).random((3, 6, 6))
    sizes = np.array([2, 2, 2])
    ranks = keep_flow(flow, sizes, np.random.default_rng(0), Budget(0.0), effort_for(4, 6, 3))
    assert (ranks == contiguous_ranks(4, sizes)).all()


def test_labels_are_matched_exactly_and_within_ranks_of_one_size():
    rng = np.random.default_rng(3)
    sizes = np.array([3, 3, 2, 2])
    ranks = contiguous_ranks(5, sizes)
    flow = (ranks[0][:, None] == ranks[0]) * rng.random((4, 10, 10))
    shuffled = ranks.copy()
    for layer in range(5):
        shuffled[layer] = np.array([1, 0, 3, 2] if layer % 2 else [0, 1, 2, 3])[ranks[layer]]
    assert kept_flow(flow, shuffled) == 0
    changed = _match_labels(flow, shuffled, sizes)
    assert changed.all()
    assert kept_flow(flow, shuffled) == pytest.approx(flow.sum())
    assert not _match_labels(flow, shuffled, sizes).any()
    flow[0] = np.roll(flow[0], 6, axis=1)  # the best match would put three experts on two slots
    _match_labels(flow, shuffled, sizes)
    assert all((np.bincount(row) == sizes).all() for row in shuffled)

"""The choice of one candidate per layer against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solvers import Problem
from solvers.layers import Candidate
from solvers.selection import ELASTIC_PRICE, Caps, choose, prices

NO_SLOTS = np.zeros(0, np.int64)


def problem_with(num_workloads, robust="mean"):
    return Problem(
        load=np.ones((1, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2, robust=robust,
        scenario_load=np.ones((num_workloads, 1, 4)), workload=np.arange(num_workloads),
    )  # fmt: skip


def candidate_with(traffic, imbalance, moves=0, width=2):
    return Candidate(NO_SLOTS, traffic, imbalance, moves, width)


@st.composite
def pools(draw, num_workloads=1):
    def figures(low, high):
        numbers = st.lists(st.floats(low, high), min_size=num_workloads, max_size=num_workloads)
        return np.array(draw(numbers))

    def candidate():
        return candidate_with(
            figures(0.5, 4.0), figures(1.0, 3.0), draw(st.integers(0, 5)), draw(st.integers(2, 4))
        )

    return [[candidate() for _ in range(draw(st.integers(1, 4)))]
            for _ in range(draw(st.integers(1, 4)))]  # fmt: skip


def imbalance(problem, choice):
    return float(problem.aggregate(np.mean([c.imbalance for c in choice], axis=0)))


def traffic(problem, choice):
    return float(problem.aggregate(np.mean([c.traffic for c in choice], axis=0)))


@given(pools=pools(), cap=st.floats(1.0, 3.0))
def test_the_cap_is_kept_whenever_some_choice_keeps_it(pools, cap):
    problem = problem_with(1)
    chosen = choose(pools, problem, Caps(cap))
    assert all(any(c is other for other in pool) for c, pool in zip(chosen, pools, strict=True))
    every = [list(one) for one in itertools.product(*pools)]
    least = min(imbalance(problem, one) for one in every)
    assert imbalance(problem, chosen) <= max(cap, least) + 0.05


@pytest.mark.parametrize("robust", ["mean", "worst", "cvar"])
@given(data=st.data())
def test_the_choice_is_within_one_layer_of_the_best_under_every_limit(robust, data):
    found = data.draw(pools(num_workloads=3))
    caps = Caps(2.0, 0.0, moves=3 * len(found), slots=3 * len(found))
    problem = problem_with(3, robust)

    def broken(choice):
        return (
            max(0.0, imbalance(problem, choice) - 2.0)
            + max(0, sum(c.moves for c in choice) - 3 * len(found))
            + max(0, sum(c.width for c in choice) - 3 * len(found))
        )

    def value(choice):
        return traffic(problem, choice) + ELASTIC_PRICE * broken(choice)

    best = min(value(one) for one in itertools.product(*found))
    chosen = value(choose(found, problem, caps))
    spread = max(np.ptp([c.traffic for c in pool]) for pool in found)
    assert best - 1e-9 <= chosen
    if best < ELASTIC_PRICE * 0.01:  # some choice keeps every limit
        assert chosen <= best + 3 * spread + ELASTIC_PRICE * 0.1


@given(pools=pools())
def test_without_limits_every_layer_takes_its_least_traffic(pools):
    problem = problem_with(1)
    chosen = choose(pools, problem, Caps())
    assert [c.traffic[0] for c in chosen] == [min(c.traffic[0] for c in pool) for pool in pools]
    assert prices(pools, problem, Caps()).imbalance == (0.0,)


@given(pool=pools().map(lambda p: p[0]), cap=st.floats(1.0, 3.0))
def test_one_layer_is_solved_exactly(pool, cap):
    chosen = choose([pool], problem_with(1), Caps(cap))[0]
    keeping = [c.traffic[0] for c in pool if c.imbalance[0] <= cap]
    if keeping:
        assert chosen.imbalance[0] <= cap + 1e-11
        assert chosen.traffic[0] <= min(keeping) + 1e-11


def test_the_price_of_a_cap_is_what_imbalance_trades_for():
    """Two layers, each 1 message for 0.5 of imbalance; the cap allows half of it."""
    pool = [
        candidate_with(np.array([3.0]), np.array([1.0])),
        candidate_with(np.array([2.0]), np.array([1.5])),
    ]
    found = prices([pool, pool], problem_with(1), Caps(1.25))
    assert found.imbalance == pytest.approx((2.0,))


def test_a_workload_that_fares_worst_sets_the_price():
    """No candidate helps the first workload; only the second one's traffic can matter."""
    pool = [
        candidate_with(np.array([1.0, 5.0]), np.ones(2)),
        candidate_with(np.array([2.0, 4.0]), np.ones(2)),
    ]
    worst = problem_with(2, "worst")
    assert choose([pool], worst, Caps())[0] is pool[1]
    assert prices([pool], worst, Caps()).traffic == pytest.approx((0.0, 1.0))
    assert choose([pool], problem_with(2), Caps())[0] in pool


def test_an_unattainable_cap_asks_for_balance():
    pool = [
        candidate_with(np.array([1.0]), np.array([2.0])),
        candidate_with(np.array([2.0]), np.array([1.5])),
    ]
    assert choose([pool], problem_with(1), Caps(1.2))[0] is pool[1]
    assert prices([pool], problem_with(1), Caps(1.2)).imbalance == pytest.approx((ELASTIC_PRICE,))

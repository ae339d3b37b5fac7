"""The knapsack over layers against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from solvers.local_search import BALANCE_PRICE, Candidate, choose

NO_SLOTS = np.zeros(0, np.int64)
FIGURES = st.tuples(st.floats(0.5, 4.0), st.floats(1.0, 3.0))
POOLS = st.lists(
    st.lists(FIGURES.map(lambda f: Candidate(NO_SLOTS, *f)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def mean_imbalance(choice):
    return float(np.mean([c.imbalance for c in choice]))


def total_traffic(choice):
    return sum(c.traffic for c in choice)


@given(pools=POOLS, cap=st.floats(1.0, 3.0))
def test_the_cap_is_kept_whenever_some_choice_keeps_it(pools, cap):
    chosen, _ = choose(pools, cap)
    assert len(chosen) == len(pools)
    assert all(any(c is other for other in pool) for c, pool in zip(chosen, pools, strict=True))
    every = [list(one) for one in itertools.product(*pools)]
    if any(mean_imbalance(one) <= cap for one in every):
        assert mean_imbalance(chosen) <= cap + 1e-9
    else:
        assert mean_imbalance(chosen) == min(map(mean_imbalance, every))


@given(pools=POOLS, cap=st.floats(1.0, 3.0))
def test_the_choice_is_within_one_layer_of_the_best(pools, cap):
    """The Lagrangian's choice differs from the optimum by at most one layer's exchange."""
    keeping = [list(one) for one in itertools.product(*pools) if mean_imbalance(one) <= cap]
    if not keeping:
        return
    chosen, _ = choose(pools, cap)
    best = min(map(total_traffic, keeping))
    exchange = max(max(c.traffic for c in p) - min(c.traffic for c in p) for p in pools)
    assert best - 1e-9 <= total_traffic(chosen) <= best + exchange + 1e-6


@given(pools=POOLS)
def test_without_a_cap_every_layer_takes_its_least_traffic(pools):
    chosen, price = choose(pools, None)
    assert price == 0.0
    assert total_traffic(chosen) == sum(min(c.traffic for c in pool) for pool in pools)


@given(pool=st.lists(FIGURES.map(lambda f: Candidate(NO_SLOTS, *f)), min_size=1, max_size=5),
       cap=st.floats(1.0, 3.0))  # fmt: skip
def test_one_layer_is_solved_exactly(pool, cap):
    chosen, _ = choose([pool], cap)
    keeping = [c for c in pool if c.imbalance <= cap]
    if keeping:
        assert chosen[0].traffic <= min(c.traffic for c in keeping) + 1e-6


def test_an_unattainable_cap_asks_for_balance():
    pool = [Candidate(NO_SLOTS, 1.0, 2.0), Candidate(NO_SLOTS, 2.0, 1.5)]
    chosen, price = choose([pool], 1.2)
    assert (chosen[0].imbalance, price) == (1.5, BALANCE_PRICE)

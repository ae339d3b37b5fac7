"""The annealing kernel's costs are exact: they equal a count from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import anneal

from .cases import balance, group_of, groups_used, random_tokens


def spread(rng, num_experts, num_ranks, width):
    """[S] experts in random slots, the rest empty."""
    slots = np.full(num_ranks * width, -1, np.int64)
    slots[rng.permutation(slots.size)[:num_experts]] = np.arange(num_experts)
    return slots


def traffic(tokens, slots, groups, weights):
    """Weighted span of one layer, summed over tokens and levels."""
    total = 0.0
    for count, weight in zip(groups, weights, strict=True):
        where = group_of(slots, count)
        total += weight * sum(len(groups_used(row, where)) for row in tokens)
    return total


def coherent_traffic(tokens, slots, groups, weights, home, after):
    """Twice the span less one for each boundary at which a token need not move.

    Args:
        home: per level, [T] group where each token enters, -1 = nowhere.
        after: per level, the groups that each token uses in the next layer.
    """
    total = 0.0
    for level, (count, weight) in enumerate(zip(groups, weights, strict=True)):
        where = group_of(slots, count)
        for t, row in enumerate(tokens):
            used = groups_used(row, where)
            stays = home[level][t] in used
            leaves_from = where[int(row[0])] if row[0] >= 0 else None
            stays_next = leaves_from in after[level][t]
            total += weight * (2 * len(used) - stays - stays_next)
    return total


def bits_where(num_groups, inside):
    """[groups, W] words; inside(t) -> groups of token t."""
    num_tokens = len(inside)
    rows = np.zeros((num_groups, (num_tokens + 63) // 64), np.uint64)
    for t, groups in enumerate(inside):
        for group in groups:
            rows[group, t // 64] |= np.uint64(1) << np.uint64(t % 64)
    return rows


@st.composite
def layers(draw):
    """A layer's tokens, its slots on some ranks, and levels of groups."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.sampled_from([2, 3, 4, 6]))
    num_experts = draw(st.integers(max(2, num_ranks // 2), 12))
    width = -(-num_experts // num_ranks) + draw(st.integers(0, 2))
    tokens = random_tokens(
        rng, draw(st.integers(1, 90)), 1, num_experts, min(3, num_experts), gaps=True
    )[:, 0]
    nodes = num_ranks % 2 == 0 and draw(st.booleans())
    groups = np.array([num_ranks, 2] if nodes else [num_ranks], np.int64)
    weights = np.array([1.0, 2.5] if nodes else [1.0])
    return rng, tokens, spread(rng, num_experts, num_ranks, width), groups, weights, num_experts


def run(rng, tokens, slots, groups, weights, num_experts, coherent=None, proposals=40):
    """Anneal a copy; (returned cost, new slots, cost function of the search)."""
    load = np.bincount(tokens[tokens >= 0], minlength=num_experts) + rng.random(num_experts)
    relative = np.append(load / (load.sum() / groups[0]), 0.0)
    price, square_price, token_price = 0.7, 0.3, 1 / len(tokens)
    result = slots.copy()
    bits = anneal.pack_bits(tokens, num_experts)
    once, twice = np.zeros((2, groups.sum(), bits.shape[1]), np.uint64)
    extra = (None, None, None) if coherent is None else coherent
    returned = anneal.anneal_layer(
        bits, relative, result, slots.copy(), once, twice, groups, weights, token_price, price,
        square_price, 0.5, 0.9, proposals, int(rng.integers(2**32)), *extra,
    )  # fmt: skip

    def balance_cost(which):
        peak, squares = balance(load, which, int(groups[0]))
        return price * peak + square_price * squares

    return returned, result, token_price, balance_cost


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_the_cost_of_alltoall_traffic_equals_a_count_from_scratch(case):
    _, tokens, slots, groups, weights, _ = case
    returned, result, token_price, balance_cost = run(*case)
    start = token_price * traffic(tokens, slots, groups, weights)
    end = token_price * traffic(tokens, result, groups, weights) + balance_cost(result)
    assert returned + start == pytest.approx(end, abs=1e-9)
    assert sorted(result) == sorted(slots)


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_the_cost_of_coherent_traffic_equals_a_count_from_scratch(case):
    rng, tokens, slots, groups, weights, num_experts = case
    num_tokens = len(tokens)
    home = [rng.integers(-1, count, num_tokens) for count in groups]
    after = [
        [set(rng.integers(0, count, 2).tolist()) for _ in range(num_tokens)] for count in groups
    ]
    stacked_home = np.concatenate(
        [
            bits_where(count, [{int(h)} - {-1} for h in home[level]])
            for level, count in enumerate(groups)
        ]
    )
    stacked_after = np.concatenate(
        [bits_where(count, after[level]) for level, count in enumerate(groups)]
    )
    primary_bits = anneal.pack_bits(np.ascontiguousarray(tokens[:, :1]), num_experts)
    returned, result, token_price, balance_cost = run(
        *case, coherent=(primary_bits, stacked_home, stacked_after)
    )
    start = token_price * coherent_traffic(tokens, slots, groups, weights, home, after)
    end = token_price * coherent_traffic(tokens, result, groups, weights, home, after)
    assert returned + start == pytest.approx(end + balance_cost(result), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(case=layers())
def test_the_state_given_back_is_never_worse_than_the_start(case):
    _, tokens, slots, groups, weights, _ = case
    _, result, token_price, balance_cost = run(*case, proposals=200)
    before, after = (
        token_price * traffic(tokens, which, groups, weights) + balance_cost(which)
        for which in (slots, result)
    )
    assert after <= before + 1e-9


def test_the_kernel_moves_experts_at_all():
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 80, 1, 8, 2)[:, 0]
    slots = spread(rng, 8, 4, 2)
    _, result, _, _ = run(rng, tokens, slots, np.array([4]), np.array([1.0]), 8, proposals=2000)
    assert (result != slots).any()


@given(st.data())
def test_packed_bits_are_the_tokens_of_each_expert(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    num_tokens = data.draw(st.integers(1, 130))
    tokens = random_tokens(rng, num_tokens, 1, 6, 3, gaps=True)[:, 0]
    bits = anneal.pack_bits(tokens, 6)
    assert bits.shape == (7, (num_tokens + 63) // 64)
    unpacked = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :num_tokens]
    for expert in range(6):
        assert (unpacked[expert].astype(bool) == (tokens == expert).any(axis=1)).all()
    assert not bits[6].any()
    assert anneal.count_bits(bits) == (tokens >= 0).sum()


def test_cover_counts_tokens_with_one_and_with_two_experts():
    tokens = np.array([[0, 1], [1, 2], [2, 3], [0, 3]])
    bits = anneal.pack_bits(tokens, 4)
    once, twice = np.zeros((2, 1), np.uint64)
    anneal.cover(bits, np.array([0, 1, 3, 2]), 0, 2, once, twice)
    assert (int(once[0]), int(twice[0])) == (0b1011, 0b0001)


def test_random_numbers_keep_to_their_range_and_reach_all_of_it():
    state = np.array([12345], np.uint64)
    drawn = [anneal.below(state, 5) for _ in range(500)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    shares = [anneal.uniform(state) for _ in range(500)]
    assert 0 <= min(shares) < 0.05 < 0.95 < max(shares) < 1

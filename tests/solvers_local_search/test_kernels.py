"""The annealing kernel's costs are exact: they equal a count from scratch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import anneal

from .cases import group_of, groups_used, random_tokens


def spread(rng, num_experts, num_ranks, width):
    """[S] experts in random slots, the rest empty."""
    slots = np.full(num_ranks * width, -1, np.int64)
    slots[rng.permutation(slots.size)[:num_experts]] = np.arange(num_experts)
    return slots


def traffic(tokens, slots, groups, rows):
    """Priced span of one layer, summed over tokens and levels; rows: [level][group] prices."""
    total = 0.0
    for count, prices in zip(groups, rows, strict=True):
        where = group_of(slots, count)
        total += sum(prices[group] for row in tokens for group in groups_used(row, where))
    return total


def coherent_traffic(tokens, slots, groups, rows, home, after):
    """Twice the span less one for each boundary at which a token need not move, priced.

    Args:
        home: per level, [T] group where each token enters, -1 = nowhere.
        after: per level, the groups that each token uses in the next layer.
    """
    total = 0.0
    for level, (count, prices) in enumerate(zip(groups, rows, strict=True)):
        where = group_of(slots, count)
        for t, row in enumerate(tokens):
            used = groups_used(row, where)
            total += 2 * sum(prices[group] for group in used)
            if home[level][t] in used:
                total -= prices[home[level][t]]
            leaves_from = where[int(row[0])] if row[0] >= 0 else None
            if leaves_from in after[level][t]:
                total -= prices[leaves_from]
    return total


def bits_where(num_groups, inside):
    """[groups, W] words; inside(t) -> groups of token t."""
    num_tokens = len(inside)
    rows = np.zeros((num_groups, (num_tokens + 63) // 64), np.uint64)
    for t, groups in enumerate(inside):
        for group in groups:
            rows[group, t // 64] |= np.uint64(1) << np.uint64(t % 64)
    return rows


@dataclass
class Case:
    """A layer of two workloads and two scenarios on unequal ranks, in some placement.

    The tokens of the second workload begin with a new word.
    """

    rng: np.random.Generator
    tokens: np.ndarray
    slots: np.ndarray
    groups: np.ndarray
    num_experts: int

    def __post_init__(self):
        rng, num_ranks = self.rng, int(self.groups[0])
        self.workload = np.arange(len(self.tokens)) >= 64
        self.segments = np.array([0, 1, -(-len(self.tokens) // 64)])
        self.token_prices = rng.random(2)
        self.rows = [rng.random(count) + 0.1 for count in self.groups]
        load = rng.random((2, self.num_experts)) + 0.1
        mean = load.sum(axis=1, keepdims=True) / num_ranks
        self.loads = np.pad(load / mean, ((0, 0), (0, 1)))
        self.load_prices = np.array([0.7, 0.2])
        fair = rng.random(num_ranks) + 0.5
        self.fair = fair / fair.mean()
        self.held = rng.random((self.num_experts + 1, num_ranks)) < 0.4
        self.held[-1] = True
        self.move_price = 0.03
        self.free = np.sort(rng.permutation(self.slots.size)[: max(2, self.slots.size - 2)])

    def cost(self, slots, of_traffic=traffic, *extra):
        """From scratch."""
        total = 0.0
        for which in (0, 1):
            chosen = self.workload == bool(which)
            more = [[np.asarray(x, object)[chosen] for x in levels] for levels in extra]
            total += self.token_prices[which] * of_traffic(
                self.tokens[chosen], slots, self.groups, self.rows, *more
            )
        return total + self.other_cost(slots)

    def other_cost(self, slots):
        num_ranks = int(self.groups[0])
        rank = np.arange(slots.size) // (slots.size // num_ranks)
        total = 0.0
        for price, load in zip(self.load_prices, self.loads, strict=True):
            by_rank = [
                sum(load[e] for e in slots[rank == g] if e >= 0) / self.fair[g]
                for g in range(num_ranks)
            ]
            squares = sum(x * x * f for x, f in zip(by_rank, self.fair, strict=True)) / num_ranks
            total += price * (max(by_rank) + anneal.SQUARE_SHARE * squares)
        moves = sum(not self.held[e, g] for e, g in zip(slots, rank, strict=True) if e >= 0)
        return total + self.move_price * moves

    def run(self, coherent=(None, None, None), proposals=40):
        """(returned cost, new slots) of an anneal of a copy."""
        result = self.slots.copy()
        returned = anneal.anneal_layer(
            anneal.pack_bits(self.tokens, self.num_experts), self.segments, self.token_prices,
            self.groups, np.concatenate(self.rows), self.loads, self.load_prices, self.fair,
            self.held, self.move_price, result, self.free, 0.5, 0.9, proposals,
            int(self.rng.integers(2**32)), *coherent, np.zeros(1, np.int64),
        )  # fmt: skip
        return returned, result


@st.composite
def layers(draw):
    """A layer's tokens, its slots on some ranks, and levels of groups."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.sampled_from([2, 3, 4, 6]))
    num_experts = draw(st.integers(max(2, num_ranks // 2), 12))
    width = -(-num_experts // num_ranks) + draw(st.integers(0, 2))
    tokens = random_tokens(
        rng, draw(st.integers(66, 150)), 1, num_experts, min(3, num_experts), gaps=True
    )[:, 0]
    nodes = num_ranks % 2 == 0 and draw(st.booleans())
    groups = np.array([num_ranks, 2] if nodes else [num_ranks], np.int64)
    return Case(rng, tokens, spread(rng, num_experts, num_ranks, width), groups, num_experts)


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_the_cost_of_alltoall_traffic_equals_a_count_from_scratch(case):
    returned, result = case.run()
    start = case.cost(case.slots) - case.other_cost(case.slots)
    assert returned + start == pytest.approx(case.cost(result), abs=1e-9)
    assert sorted(result) == sorted(case.slots)


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_slots_that_are_not_free_stay_as_they_are(case):
    _, result = case.run(proposals=200)
    fixed = np.setdiff1d(np.arange(result.size), case.free)
    assert (result[fixed] == case.slots[fixed]).all()


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_the_cost_of_coherent_traffic_equals_a_count_from_scratch(case):
    num_tokens = len(case.tokens)
    home = [case.rng.integers(-1, count, num_tokens) for count in case.groups]
    after = [
        [set(case.rng.integers(0, count, 2).tolist()) for _ in range(num_tokens)]
        for count in case.groups
    ]
    stacked_home = np.concatenate(
        [
            bits_where(count, [{int(h)} - {-1} for h in home[level]])
            for level, count in enumerate(case.groups)
        ]
    )
    stacked_after = np.concatenate(
        [bits_where(count, after[level]) for level, count in enumerate(case.groups)]
    )
    primary_bits = anneal.pack_bits(np.ascontiguousarray(case.tokens[:, :1]), case.num_experts)
    returned, result = case.run((primary_bits, stacked_home, stacked_after))
    start = case.cost(case.slots, coherent_traffic, home, after) - case.other_cost(case.slots)
    end = case.cost(result, coherent_traffic, home, after)
    assert returned + start == pytest.approx(end, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(case=layers())
def test_the_state_given_back_is_never_worse_than_the_start(case):
    _, result = case.run(proposals=200)
    assert case.cost(result) <= case.cost(case.slots) + 1e-9


def test_a_search_that_is_stopped_gives_back_its_start():
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 80, 1, 8, 2)[:, 0]
    case = Case(rng, tokens, spread(rng, 8, 4, 2), np.array([4]), 8)
    slots = case.slots.copy()
    anneal.anneal_layer(
        anneal.pack_bits(tokens, 8), case.segments, case.token_prices, case.groups,
        np.concatenate(case.rows), case.loads, case.load_prices, case.fair, case.held, 0.0, slots,
        case.free, 0.5, 0.9, 10**6, 1, None, None, None, np.ones(1, np.int64),
    )  # fmt: skip
    assert (slots == case.slots).all()


def test_the_kernel_moves_experts_at_all():
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 80, 1, 8, 2)[:, 0]
    slots = spread(rng, 8, 4, 2)
    _, result = Case(rng, tokens, slots, np.array([4]), 8).run(proposals=2000)
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
    assert sum(anneal.count_bits(row) for row in bits) == (tokens >= 0).sum()


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

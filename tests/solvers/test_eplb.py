"""EPLB as published, without doubles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem, solve
from solvers.check import check
from solvers.packing import pack, replicate
from solvers.published.eplb import balance

# the example of DeepSeek's README
LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    np.float64,
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def problem_of(load, num_ranks, slots_per_rank, ranks_per_node=None, num_groups=1):
    return Problem(
        load=np.atleast_2d(np.asarray(load, np.float64)),
        num_ranks=num_ranks,
        slots_per_rank=slots_per_rank,
        ranks_per_node=ranks_per_node or num_ranks,
        num_groups=num_groups,
        objective="balance",
    )


def test_the_published_example_gives_the_published_placement():
    result = solve(problem_of(LOAD, 8, 2, 4, num_groups=4), "eplb")
    assert result.placement.tolist() == PUBLISHED
    assert result.notes == {"policy": "hierarchical", "doubles_parted": 0}


def test_groups_that_nodes_do_not_divide_mean_global():
    uneven = solve(problem_of(LOAD, 8, 2, 4, num_groups=3), "eplb")
    assert uneven.notes["policy"] == "global"
    everywhere = solve(problem_of(LOAD, 8, 2, 4, num_groups=4), "eplb_global")
    assert (uneven.placement == everywhere.placement).all()
    assert everywhere.placement.tolist() != PUBLISHED


def test_hierarchical_keeps_a_group_on_one_node():
    rng = np.random.default_rng(0)
    problem = problem_of(rng.gamma(1.0, size=(5, 32)), 8, 5, ranks_per_node=2, num_groups=8)
    result = solve(problem, "eplb")
    for row in result.placement.reshape(5, 4, 10):
        groups = [set((node // 4).tolist()) for node in row]
        assert all(len(held) == 2 for held in groups)
        assert len(set().union(*groups)) == 8


@settings(max_examples=100, deadline=None)
@given(
    loads=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    spare=st.integers(0, 4),
    max_copies=st.integers(1, 4),
)
def test_copies_minimise_the_largest_load_per_copy(loads, spare, max_copies):
    load = np.array(loads, np.float64)
    experts = replicate(load, load.size + spare, max_copies)
    copies = np.bincount(experts, minlength=load.size)
    assert copies.min() >= 1
    assert copies.max() <= max_copies
    assert copies.sum() == min(load.size + spare, load.size * max_copies)
    best = min(
        (load / counts).max()
        for counts in itertools.product(range(1, max_copies + 1), repeat=load.size)
        if sum(counts) <= load.size + spare
    )
    assert (load / copies).max() == pytest.approx(best)


def test_packing_takes_the_heaviest_first_into_the_lightest_pack_with_room():
    assert pack(np.array([5.0, 9, 1, 3, 2, 2]), 2, 3) == [[1, 5, 2], [0, 3, 4]]
    assert pack(np.array([1.0, 8, 1, 1]), 2, 2) == [[1, 3], [0, 2]]  # full packs take no more
    assert pack(np.array([1.0, 9, 5]), 3, 1) == [[0], [1], [2]]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(1, 10),
    num_ranks=st.integers(1, 5),
    spare=st.integers(0, 4),
)
def test_doubles_are_parted_whatever_the_load(seed, num_experts, num_ranks, spare):
    rng = np.random.default_rng(seed)
    load = rng.gamma(0.15, size=num_experts) * rng.integers(0, 2, num_experts)
    slots = -(-num_experts // num_ranks) + spare
    table, _ = balance(load, num_ranks, slots)
    for row in table:
        held = row[row >= 0].tolist()
        assert len(held) == len(set(held))
    copies = np.bincount(table[table >= 0], minlength=num_experts)
    assert copies.sum() == min(num_ranks * slots, num_experts * num_ranks)
    assert copies.min() >= 1


def test_parting_a_double_costs_little():
    rng = np.random.default_rng(3)
    parted, worse = 0, []
    for _ in range(200):
        load = rng.gamma(0.1, size=6) + 0.01
        table, trades = balance(load, 3, 4)
        if trades:
            parted += 1
            share = load / np.bincount(table.ravel(), minlength=6)
            worst = share[table].sum(axis=1).max()
            worse.append(worst / (load.sum() / 3))
    assert parted > 20
    assert np.mean(worse) < 1.1


def test_redundant_slots_help():
    load = np.random.default_rng(1).gamma(0.5, size=(4, 32))
    imbalance = [
        solve(problem_of(load, 8, slots), "eplb").parts["imbalance"] for slots in (4, 5, 6)
    ]
    contiguous = check(problem_of(load, 8, 4), np.tile(np.arange(32), (4, 1)))["imbalance"]
    assert contiguous > imbalance[0] > imbalance[1] > imbalance[2] >= 1

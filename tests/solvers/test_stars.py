"""Stars: no placement breaks one, those that are broken are found, and they prove more."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Budget
from solvers.bounds import relaxation
from solvers.bounds.relaxation import Chain, bound_kept
from solvers.bounds.stars import (
    MOST_LEAVES,
    Stars,
    larger_violated,
    no_stars,
    violated_between,
    violated_within,
)


def left_sides(stars: Stars, x: np.ndarray) -> np.ndarray:
    """[N] what (3) says is at most 1, from the entries of M by their numbers."""
    sides, at = [], 0
    for leaves in stars.leaves:
        pairs = leaves * (leaves - 1) // 2
        entries = stars.entries[at : at + leaves + pairs]
        sides.append(x[entries[:leaves]].sum() - x[entries[leaves:]].sum())
        at += leaves + pairs
    return np.array(sides)


def numbered(ranks: np.ndarray) -> np.ndarray:
    """Entries of M by their numbers, of a placement [L, E]; those below the diagonal are NaN."""
    size = ranks.shape[1]
    lower = np.tril_indices(size)
    blocks = [(row[:, None] == row).astype(float) for row in ranks]
    for block in blocks:
        block[lower] = np.nan
    blocks += [(a[:, None] == b) * 1.0 for a, b in pairwise(ranks)]
    return np.concatenate([block.ravel() for block in blocks])


def random_stars(rng: np.random.Generator, layers: int, experts: int, number: int) -> Stars:
    members = np.full((number, MOST_LEAVES + 1), -1, np.int32)
    for row in members:
        size = rng.integers(3, MOST_LEAVES + 2)
        row[:size] = rng.integers(layers - 1) * experts + rng.permutation(2 * experts)[:size]
    return Stars.of(members, layers, experts)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(2, 6, 2), (3, 8, 4), (4, 9, 3)]))
def test_every_placement_keeps_every_star(seed, shape):
    layers, experts, ranks = shape
    rng = np.random.default_rng(seed)
    stars = random_stars(rng, layers, experts, 200)
    row = np.repeat(np.arange(ranks), experts // ranks)
    placement = rng.permuted(np.tile(row, (layers, 1)), axis=1)
    sides = left_sides(stars, numbered(placement))
    assert sides.max() == 1


def test_entries_are_those_of_the_members():
    members = np.array([[7, 2, 4, 1, -1, -1]], np.int32)  # E = 4: expert 3 of layer 1, ...
    stars = Stars.of(members, 3, 4)
    within, between = [1 * 16 + 0 * 4 + 3, 0 * 16 + 1 * 4 + 2], 3 * 16
    assert stars.leaves.tolist() == [3]
    assert stars.entries.tolist() == [
        between + 2 * 4 + 3, within[0], between + 1 * 4 + 3,  # centre 7 with 2, 4, 1
        between + 2 * 4 + 0, within[1], between + 1 * 4 + 0,  # 2 with 4, 2 with 1, 4 with 1
    ]  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_is_found_is_violated_and_nothing_is_found_in_a_placement(seed):
    rng = np.random.default_rng(seed)
    experts = 9
    square = rng.uniform(0, 1, (2 * experts, 2 * experts)).astype(np.float32)
    ranks = rng.permuted(np.tile(np.repeat(np.arange(3), 3), (2, 1)), axis=1).ravel()
    for same, broken in (
        (np.maximum(square, square.T), True),
        ((ranks[:, None] == ranks).astype(np.float32), False),
    ):
        np.fill_diagonal(same, 1.0)
        first, second = same[:experts, :experts].copy(), same[experts:, experts:].copy()
        between = same[:experts, experts:].copy()
        entries = np.concatenate([block.ravel() for block in (first, second, between)])
        for found in (
            violated_within(first, 0),
            violated_between(first, between, second, 0),
            larger_violated(same, 0, experts),
        ):
            assert not len(found) or broken
            assert (left_sides(Stars.of(found, 2, experts), entries) > 1).all()


def test_a_star_that_keeps_all_triangles_is_found_once():
    same = np.eye(8, dtype=np.float32)
    same[2, [1, 4, 7]] = same[[1, 4, 7], 2] = 0.5
    assert len(violated_within(same, 0)) == 0
    (star,) = larger_violated(same, 0, 8)
    assert [star[0], *sorted(star[1:4]), *star[4:]] == [2, 1, 4, 7, -1, -1]


def test_idle_stars_go_and_those_at_work_stay():
    stars = random_stars(np.random.default_rng(0), 3, 8, 50)
    stars.multiplier[:10] = 1.0
    for _ in range(30):
        stars = stars.renewed(no_stars(), 3, 8)
    assert stars.multiplier.tolist() == [1.0] * 10


def test_larger_stars_prove_more_than_triangles_alone(monkeypatch):
    rng = np.random.default_rng(3)
    here, there = rng.standard_normal((2, 32, 6))
    flow = np.exp(-((here[:, None] - there) ** 2).sum(axis=2) / 6)
    chain = Chain(8, np.zeros((2, 32, 32)), flow[None])
    proof = bound_kept(chain, Budget(), 300)
    monkeypatch.setattr(relaxation, "_LARGER_FROM", 10**9)
    assert proof.kept < 0.99 * bound_kept(chain, Budget(), 300).kept

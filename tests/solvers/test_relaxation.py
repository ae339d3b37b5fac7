"""The doubly nonnegative relaxation: never below what can be kept, and close to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import random_placement

from solvers import Budget, Problem, check
from solvers.bounds.certifying import certify
from solvers.bounds.relaxation import Chain, bound_kept, evaluate
from solvers.bounds.stars import MOST_LEAVES, Stars

FIGURES = ("cross_rank_fraction", "coactivation_cut")


def problem_of(seed: int, layers: int, experts: int, ranks: int, sharp: float = 2.0) -> Problem:
    rng = np.random.default_rng(seed)
    together = np.exp(sharp * rng.standard_normal((layers, experts, experts)))
    load = rng.uniform(1, 2, (layers, experts))
    return Problem(
        load=load,
        num_ranks=ranks,
        slots_per_rank=experts // ranks,
        ranks_per_node=ranks,
        affinity=np.exp(sharp * rng.standard_normal((layers - 1, experts, experts))),
        coactivation=together + together.transpose(0, 2, 1),
    )


def balanced_partitions(experts: int, ranks: int) -> list[tuple[int, ...]]:
    """All ways to give every expert a rank, equally many each; rank names count."""
    return sorted(set(permutations(np.repeat(np.arange(ranks), experts // ranks).tolist())))


def kept(chain: Chain, ranks: np.ndarray) -> float:
    same = [row[:, None] == row for row in ranks]
    total = sum(float((q * s).sum()) for q, s in zip(chain.together, same, strict=True))
    if chain.flow is not None:
        for layer, flow in enumerate(chain.flow):
            total += float(flow[ranks[layer][:, None] == ranks[layer + 1]].sum())
    return total


def chain_of(seed: int, blocks: int, layers: int, experts: int, ranks: int) -> Chain:
    rng = np.random.default_rng(seed)
    together = rng.exponential(1, (layers, experts, experts)) ** 2
    together = (together + together.transpose(0, 2, 1)) * (1 - np.eye(experts))
    flow = None if blocks == 1 else rng.exponential(1, (layers - 1, experts, experts)) ** 2
    return Chain(ranks, together, flow)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    blocks=st.sampled_from([1, 2]),
    shape=st.sampled_from([(2, 6, 2), (2, 4, 2), (3, 4, 4), (2, 6, 3)]),
    iterations=st.sampled_from([1, 7, 60]),
)
def test_bound_is_never_below_the_best_of_all_placements(seed, blocks, shape, iterations):
    layers, experts, ranks = shape
    chain = chain_of(seed, blocks, layers, experts, ranks)
    rows = np.array(balanced_partitions(experts, ranks))
    if blocks == 1:
        best = sum(
            max(kept(Chain(ranks, q[None]), row[None]) for row in rows) for q in chain.together
        )
    else:
        # the first layer's rank names do not matter
        firsts = [row for row in rows if list(dict.fromkeys(row)) == sorted(set(row))]
        best = max(
            kept(chain, np.stack([first, *others]))
            for first in firsts
            for others in product(rows, repeat=layers - 1)
        )
    proof = bound_kept(chain, Budget(), iterations)
    assert proof.kept >= best * (1 - 1e-12)
    if iterations == 60:
        slack = 0.01 if experts > ranks else 0.03  # with an expert a rank nothing can be kept
        assert proof.kept <= best * 1.35 + slack * chain.together.sum()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), blocks=st.sampled_from([1, 2]))
def test_any_dual_point_proves_a_bound(seed, blocks):
    chain = chain_of(seed, blocks, 3, 8, 4)
    rng = np.random.default_rng(seed)
    dual = rng.standard_normal((chain.num_copies, 8 * blocks, 8 * blocks)) * rng.uniform(0, 5)
    triples = np.array(list(combinations(range(8), 3)))  # in layer 0
    stars = np.full((56, MOST_LEAVES + 1), -1, np.int32)
    stars[:, :3] = triples
    stars[::2, 3] = 8 * blocks - 1 - rng.integers(8 * (blocks - 1) + 1, size=28)
    alike = (stars[:, 3:4] == triples).any(axis=1)
    stars[alike, 3] = -1
    stars = stars[rng.random(56) < 0.3]
    multiplier = rng.exponential(1, len(stars)).astype(np.float32)
    cuts = Stars.of(stars, 3, 8, multiplier)
    with ThreadPoolExecutor(1) as pool:
        bound = evaluate(chain, dual, cuts, rng.uniform(0.1, 10), pool)
    for _ in range(20):
        ranks = rng.permuted(np.tile(np.repeat(np.arange(4), 2), (3, 1)), axis=1)
        assert kept(chain, ranks) <= bound


@pytest.mark.parametrize("blocks", [1, 2])
def test_planted_groups_are_met_exactly(blocks):
    rng = np.random.default_rng(3)
    layers, experts, ranks = 4, 16, 4
    plan = rng.permuted(np.tile(np.repeat(np.arange(ranks), 4), (layers, 1)), axis=1)
    within = np.stack([(row[:, None] == row) * 1.0 for row in plan]) * (1 - np.eye(experts))
    flow = np.stack([(a[:, None] == b) * 1.0 for a, b in pairwise(plan)])
    chain = Chain(ranks, within, None if blocks == 1 else flow)
    proof = bound_kept(chain, Budget(), 300)
    assert kept(chain, plan) <= proof.kept <= kept(chain, plan) * (1 + 1e-3)


def test_relabelling_experts_hardly_changes_the_bound():
    chain = chain_of(5, 2, 3, 12, 3)
    rng = np.random.default_rng(0)
    names = [rng.permutation(12) for _ in range(3)]
    flow = np.stack(
        [chain.flow[layer][np.ix_(names[layer], names[layer + 1])] for layer in range(2)]
    )
    within = np.stack(
        [q[np.ix_(name, name)] for q, name in zip(chain.together, names, strict=True)]
    )
    one = bound_kept(chain, Budget(), 200)
    other = bound_kept(Chain(3, within, flow), Budget(), 200)
    assert other.kept == pytest.approx(one.kept, rel=2e-3)


def test_the_same_chain_gives_the_same_bound_to_the_last_bit():
    chain = chain_of(6, 2, 4, 16, 4)
    assert bound_kept(chain, Budget(), 80).kept == bound_kept(chain, Budget(), 80).kept


def test_a_stopped_budget_proves_nothing_and_a_running_one_stops_early():
    chain = chain_of(7, 2, 3, 8, 2)
    stopped = Budget()
    stopped.stop()
    assert bound_kept(chain, stopped, 100) is None
    proof = bound_kept(chain, Budget(1e-6 + 0.02), 10**6)
    assert proof is None or proof.iterations < 10**6


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), spare=st.booleans())
def test_certificates_are_below_every_feasible_value(seed, spare):
    problem = problem_of(seed, 3, 8, 2)
    if spare:
        problem = replace(problem, slots_per_rank=5)
    rng = np.random.default_rng(seed)
    placement = random_placement(problem, rng)
    bounds = certify(problem, placement, Budget(effort=0.1), FIGURES)
    assert [bound.figure for bound in bounds] == list(FIGURES)
    for bound in bounds:
        assert 0 <= bound.lower_bound <= bound.value
        assert bound.method == "b-matching" or not spare
        for _ in range(5):
            other = check.check(problem, random_placement(problem, rng))
            assert bound.lower_bound <= other[bound.figure] + 1e-12


def test_the_relaxation_is_tighter_than_the_b_matching_where_topics_blur():
    problem = problem_of(1, 3, 36, 4, sharp=1.0)
    placement = random_placement(problem, np.random.default_rng(0))
    for bound in certify(problem, placement, Budget(), FIGURES):
        assert bound.method == "doubly nonnegative relaxation"

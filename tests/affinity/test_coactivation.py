"""Co-activation: lift and concentration by hand, and without affinity where there is none."""

from __future__ import annotations

import numpy as np

from placer.affinity import concentration, count, lift

from .reference import random_trace, trace_of


def test_lift_by_hand():
    # experts 0 and 1 always together in 2 of 4 tokens; 2 and 3 in the others
    counts = count(trace_of(np.array([[[0, 1]], [[1, 0]], [[2, 3]], [[3, 2]]], np.int16), 5))
    found = lift(counts)[0]
    assert found[0, 1] == found[1, 0] == 2
    assert found[0, 2] == 0
    assert np.isnan(found[0, 0])
    assert np.isnan(found[0, 4])


def test_lift_of_a_random_router_is_a_little_below_one():
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(8), (40000, 1)), axis=1)[:, None, :3]
    found = lift(count(trace_of(experts.astype(np.int16), 8)))[0]
    off_diagonal = found[~np.eye(8, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, 2 * 8 / (3 * 7), rtol=0.05)


def test_concentration_by_hand():
    # pairs 01 three times, 23 once, of the 6 pairs of 4 experts
    experts = np.array([[[0, 1]], [[0, 1]], [[1, 0]], [[2, 3]]], np.int16)
    found = concentration(count(trace_of(experts, 4)))
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    np.testing.assert_allclose(found.effective_pairs, [2**entropy])
    np.testing.assert_allclose(found.effective_share, [2**entropy / 6])
    np.testing.assert_allclose(found.half_share, [1 / 6])
    # by load 3, 3, 1, 1 the pairs weigh 9, 3, 3, 3, 3, 1: the first two carry 12 of 22
    np.testing.assert_allclose(found.half_share_by_load, [2 / 6])


def test_top_1_has_no_pairs():
    found = concentration(count(random_trace(top_k=1)))
    assert np.isnan(found.effective_pairs).all()
    assert np.isnan(found.half_share).all()
    found = concentration(count(random_trace(num_experts=1, top_k=1)))
    assert np.isnan(found.half_share).all()
    assert np.isnan(found.half_share_by_load).all()

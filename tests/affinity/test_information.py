"""Mutual information: right on chains and on independent layers, honest on few tokens."""

from __future__ import annotations

import numpy as np
import pytest

from placer.affinity import (
    all_pairs_information,
    conditional,
    count,
    held_out_information,
    mutual_information,
    primary_information,
)

from .reference import random_trace, trace_of


def chain(num_tokens=400, num_experts=8, num_layers=3, seed=0):
    """Top-1 routing where the expert of a layer decides the expert of the next."""
    rng = np.random.default_rng(seed)
    expert = rng.integers(0, num_experts, num_tokens)
    layers = [expert]
    for _ in range(num_layers - 1):
        layers.append(rng.permutation(num_experts)[layers[-1]])
    return trace_of(np.stack(layers, axis=1)[:, :, None].astype(np.int16), num_experts)


def independent(seed, *, num_tokens, num_experts, top_k):
    return random_trace(
        seed, num_tokens=num_tokens, num_layers=2, num_experts=num_experts, top_k=top_k
    )


def test_mutual_information_of_known_tables():
    tables = np.array([[[1, 0], [0, 1]], [[1, 1], [1, 1]], [[2, 1], [1, 2]], [[0, 0], [0, 0]]])
    bits = mutual_information(tables)
    half = 1 / 3 * np.log2(4 / 3) * 2 + 1 / 6 * np.log2(2 / 3) * 2
    np.testing.assert_allclose(bits, [1, 0, half, np.nan], atol=1e-12)


def test_a_deterministic_chain_has_all_the_information():
    counts = count(chain())
    for information in (all_pairs_information(counts), primary_information(counts)):
        np.testing.assert_allclose(information.nmi, 1, atol=1e-12)
        np.testing.assert_allclose(information.corrected_nmi, 1, atol=1e-12)
        np.testing.assert_allclose(information.raw_bits, 3, atol=0.02)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "num_seeds"),
    [
        (300, 8, 2, 100),
        (12000, 32, 4, 5),
        (100, 32, 4, 20),
        (500, 64, 1, 10),
        (300, 128, 6, 5),
        (200, 16, 14, 40),
    ],
)
def test_independent_layers_have_no_information_once_corrected(
    num_tokens, num_experts, top_k, num_seeds
):
    found = [
        all_pairs_information(
            count(independent(s, num_tokens=num_tokens, num_experts=num_experts, top_k=top_k))
        )
        for s in range(num_seeds)
    ]
    raw = np.mean([i.raw_bits[0] for i in found])
    corrected = np.mean([i.corrected_bits[0] for i in found])
    assert abs(corrected) < max(0.08 * raw, 0.0005)
    assert abs(np.mean([i.corrected_nmi[0] for i in found])) < 0.05


def test_a_random_control_of_12_thousand_tokens_shows_3_thousandths_of_a_bit():
    trace = independent(1, num_tokens=12000, num_experts=32, top_k=4)
    information = all_pairs_information(count(trace))
    assert information.raw_bits[0] == pytest.approx(0.003, abs=0.0005)
    assert information.chance_bits[0] == pytest.approx(49 / (2 * 12000 * np.log(2)), rel=0.02)


def test_tokens_that_always_choose_every_expert_say_nothing():
    information = all_pairs_information(count(random_trace(num_experts=3, top_k=3)))
    np.testing.assert_allclose(information.raw_bits, 0, atol=1e-12)
    np.testing.assert_allclose(information.chance_bits, 0, atol=1e-12)


def test_held_out_information_of_a_chain_is_nearly_all_and_of_independent_layers_none():
    fitted, unseen = count(chain()), count(chain(num_tokens=400))
    np.testing.assert_allclose(held_out_information(fitted, unseen), 3, atol=0.1)
    first = count(independent(1, num_tokens=400, num_experts=16, top_k=2))
    second = count(independent(2, num_tokens=400, num_experts=16, top_k=2))
    assert held_out_information(first, second)[0] == pytest.approx(0, abs=0.01)


def test_only_held_out_information_sees_through_requests_of_equal_tokens():
    rng = np.random.default_rng(0)

    def requests(count_of):
        """Every request repeats one token 50 times; its layers are independent."""
        experts = rng.integers(0, 8, (count_of, 2, 1)).astype(np.int16)
        return trace_of(np.repeat(experts, 50, axis=0), 8)

    fitted, unseen = count(requests(40)), count(requests(40))
    assert all_pairs_information(fitted).corrected_bits[0] > 0.3
    assert held_out_information(fitted, unseen)[0] < 0.05


def test_nothing_is_known_where_there_is_nothing():
    one_expert = count(random_trace(num_experts=1, top_k=1))
    information = all_pairs_information(one_expert)
    np.testing.assert_array_equal(information.raw_bits, 0)
    assert np.isnan(information.nmi).all()
    no_tokens = count(random_trace(num_tokens=0))
    assert np.isnan(all_pairs_information(no_tokens).raw_bits).all()
    assert np.isnan(primary_information(no_tokens).corrected_bits).all()
    assert np.isnan(held_out_information(no_tokens, no_tokens)).all()
    one_layer = count(random_trace(num_layers=1))
    assert all_pairs_information(one_layer).raw_bits.shape == (0,)
    assert primary_information(one_layer).raw_bits.shape == (0,)
    assert held_out_information(one_layer, one_layer).shape == (0,)


def test_conditional_rows_are_distributions_or_empty():
    trace = random_trace(num_tokens=3, num_experts=9, top_k=2)
    counts = count(trace)
    rows = conditional(counts.affinity).sum(axis=2)
    np.testing.assert_allclose(rows, counts.load[:-1] > 0)
    hand = conditional(np.array([[[1, 3], [0, 0]]]))
    np.testing.assert_allclose(hand, [[[0.25, 0.75], [0, 0]]])

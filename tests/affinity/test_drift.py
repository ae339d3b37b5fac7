"""Drift: distances by hand, the chance level, and parts that are loaded apart."""

from __future__ import annotations

import numpy as np
import pytest

from placer.affinity import count, load_drift
from placer.affinity.loads import LabelLoads, RequestLoads, part_loads

from .reference import random_trace


def drift(load, other):
    load, other = np.array([load]), np.array([other])
    return load_drift(load, other, load.sum(axis=1), other.sum(axis=1))


def test_distances_by_hand():
    assert drift([1, 1, 0], [10, 10, 0]).total_variation == pytest.approx(0)
    assert drift([1, 1, 0], [10, 10, 0]).cosine == pytest.approx(0)
    assert drift([1, 0, 0], [0, 5, 5]).total_variation == pytest.approx(1)
    assert drift([1, 0, 0], [0, 5, 5]).cosine == pytest.approx(1)
    assert drift([3, 1], [1, 1]).total_variation == pytest.approx(0.25)
    assert drift([3, 1], [1, 1]).cosine == pytest.approx(1 - 4 / np.sqrt(20))


@pytest.mark.parametrize("top_k", [1, 4])
def test_chance_is_what_two_draws_of_the_same_tokens_show(top_k):
    shape = {"num_layers": 1, "num_experts": 12, "top_k": top_k}
    found = []
    for seed in range(30):
        first = count(random_trace(seed, num_tokens=300, **shape))
        second = count(random_trace(seed + 1000, num_tokens=900, **shape))
        found.append(load_drift(first.load, second.load, first.tokens, second.tokens))
    seen = np.mean([d.total_variation for d in found])
    assert np.mean([d.chance for d in found]) == pytest.approx(seen, rel=0.15)


def test_an_empty_part_is_at_no_distance():
    assert np.isnan(drift([0, 0], [1, 2]).total_variation[0])


def test_loads_of_parts_equal_their_counts():
    trace = random_trace(num_tokens=90, variable_k=True)
    part = np.arange(90) % 4 % 3
    for number, load in enumerate(part_loads(trace, part, 4)):
        counts = count(trace.select(part == number))
        np.testing.assert_array_equal(load.load, counts.load)
        np.testing.assert_array_equal(load.tokens, counts.tokens)
        assert load.num_tokens == counts.num_tokens


def test_labels_are_loaded_across_chunks():
    request = np.arange(60) // 5
    labels = {r: "code" if r % 3 else "chat" for r in range(11)}
    trace = random_trace(num_tokens=60, request=request, labels=labels)
    loads = LabelLoads()
    for cut in range(0, 60, 17):
        loads.add(trace.select((np.arange(60) >= cut) & (np.arange(60) < cut + 17)))
    assert set(loads.loads) == {"chat", "code", ""}
    code = np.array([labels.get(r) == "code" for r in request.tolist()])
    np.testing.assert_array_equal(loads.loads["code"].load, count(trace.select(code)).load)
    assert loads.loads[""].num_tokens == 5


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    "ids", [range(10), range(-500, 500), [5, 6], [0, 2**40], [3, 2**62, -(2**62)], range(64)]
)
def test_requests_are_halved_by_id_however_they_are_numbered(ids, in_order):
    ids = list(ids)
    request = np.repeat(np.array(ids, np.int64), 3)
    order = np.arange(request.size)
    if not in_order:
        order = np.random.default_rng(0).permutation(request.size)
    trace = random_trace(num_tokens=request.size, request=request[order])
    loads = RequestLoads()
    for chunk in np.array_split(np.arange(request.size), 4):
        loads.add(trace.select(np.isin(np.arange(request.size), chunk)))
    lower, higher = loads.halves()
    assert lower.num_tokens + higher.num_tokens == request.size
    assert abs(lower.num_tokens - request.size / 2) <= max(request.size / 32, 3)
    boundary = np.sort(trace.request)[lower.num_tokens]
    expected = count(trace.select(trace.request < boundary)).load
    np.testing.assert_array_equal(lower.load, expected)


def test_one_request_has_no_halves():
    loads = RequestLoads()
    loads.add(random_trace())
    assert loads.halves() is None

"""The replay agrees with an independent implementation of the design's section 5."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost import METRICS, measure, replay

from .cases import random_placement, random_trace
from .reference import evaluate


def figures(trace, placement, **options):
    return measure(replay(trace, placement, **options), num_resamples=0).values


def assert_same(found, expected):
    assert list(found) == [info.name for info in METRICS]
    assert set(found) == set(expected)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.booleans(),
    home=st.booleans(),
    steps=st.sampled_from([0, 1, 7]),
    variable_k=st.booleans(),
    num_layers=st.sampled_from([1, 2, 5]),
    num_requests=st.sampled_from([1, 2, 9]),
    shape=st.sampled_from([(4, 2, 2), (4, 4, 3), (6, 3, 2), (1, 1, 8), (3, 1, 5), (8, 8, 1)]),
    dispatch=st.sampled_from(["alltoall", "coherent", "allgather"]),
    policy=st.sampled_from(["local", "round_robin"]),
    batch_tokens=st.sampled_from([1, 7, 20, 256]),
)
def test_every_figure_agrees_with_the_reference(
    seed, weights, home, steps, variable_k, num_layers, num_requests, shape, dispatch, policy,
    batch_tokens,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    num_ranks, ranks_per_node, slots = shape
    trace = random_trace(
        rng,
        num_layers=num_layers,
        num_requests=num_requests,
        weights=weights,
        home_ranks=num_ranks if home else 0,
        steps=steps,
        variable_k=variable_k,
    )
    placement = random_placement(
        rng,
        num_layers=num_layers,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        slots_per_rank=slots,
    )
    assert placement.problems() == []
    options = {"dispatch": dispatch, "batch_tokens": batch_tokens}
    assert_same(
        figures(trace, placement, replica_policy=policy, **options),
        evaluate(trace, placement, policy=policy, **options),
    )

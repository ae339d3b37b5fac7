"""Messages by layer and link agree with a plain count, and with replay."""

from __future__ import annotations

import numpy as np
import pytest

from placer.cost import replay
from placer.placement import Placement
from placer.studies.flows import flows
from tests.conftest import topic_trace


def random_placement(seed, spare=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(6):
        order = rng.permutation(16).reshape(4, 4)
        extra = [rng.choice(np.setdiff1d(np.arange(16), row), spare, False) for row in order]
        rows.append(
            np.concatenate([np.r_[row, more] for row, more in zip(order, extra, strict=True)])
        )
    return Placement(np.array(rows), 16, 4, 2)


def by_hand(trace, placement, coherent):
    rank_of = [
        {int(e): s // placement.slots_per_rank for s, e in enumerate(row)}
        for row in placement.physical_to_logical
    ]
    primary = trace.primary()
    layer_sums = [0] * 6
    link = np.zeros((4, 4), int)
    for t in range(trace.num_tokens):
        home = int(trace.request[t]) % 4
        for layer in range(6):
            ranks = {rank_of[layer][e] for e in trace.experts[t, layer].tolist() if e >= 0}
            after = rank_of[layer].get(int(primary[t, layer]), home) if coherent else home
            for r in ranks - {home}:
                link[home, r] += 1
                layer_sums[layer] += 1
            if coherent:
                for r in ranks - {after}:
                    link[r, after] += 1
                    layer_sums[layer] += 1
            home = after
    return layer_sums, link


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_flows_are_counted_token_by_token(dispatch, weights):
    trace = topic_trace(weights=weights)
    experts = trace.experts.copy()
    experts[::7, 2] = -1  # tokens that use no expert of a layer
    object.__setattr__(trace, "experts", experts)
    placement = random_placement(1)
    found = flows(
        [trace.select(np.arange(384) < 100), trace.select(np.arange(384) >= 100)],
        placement,
        dispatch=dispatch,
        replica_policy="local",
    )
    layer_sums, link = by_hand(trace, placement, dispatch == "coherent")
    assert found.num_tokens == 384
    assert found.by_layer.tolist() == layer_sums
    np.testing.assert_array_equal(found.by_link, link)


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
@pytest.mark.parametrize("policy", ["local", "round_robin"])
def test_copies_are_chosen_as_in_replay(dispatch, policy):
    trace = topic_trace(num_requests=40)
    placement = random_placement(2, spare=2)
    found = flows([trace], placement, dispatch=dispatch, replica_policy=policy)
    expected = replay(trace, placement, dispatch=dispatch, replica_policy=policy)
    assert found.by_layer.sum() == expected.total(f"messages_{dispatch}")
    assert found.by_link.sum() == found.by_layer.sum()

"""Bytes and messages of a replay equal an independent count, exactly: message by message."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cluster import Cluster
from placer.cost import Transport, measure, replay
from placer.cost.batching import equal_runs
from placer.cost.serving import Server, home_ranks
from placer.cost.walking import Setting, count_batches

from .cases import random_placement, random_trace
from .reference import tokens_of, walk
from .reference_step_time import route


def counted(trace, placement, dispatch, policy, deduplicate, ranks_per_leaf, batch_tokens):
    setting = Setting(
        trace,
        home_ranks(trace, placement.num_ranks),
        Server(placement, dispatch, policy),
        dispatch,
        deduplicate,
        ranks_per_leaf,
        True,
        np.zeros(0),
    )
    batching = equal_runs(trace, batch_tokens, "tokens")
    return list(count_batches(setting, batching, size=2))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.booleans(),
    shape=st.sampled_from([(4, 2, 3, 1), (6, 2, 2, 2), (6, 3, 3, 1), (4, 4, 2, 1)]),
    dispatch=st.sampled_from(["alltoall", "coherent"]),
    policy=st.sampled_from(["local", "round_robin"]),
    deduplicate=st.booleans(),
)
def test_states_on_every_link_are_those_of_single_messages(
    seed, weights, shape, dispatch, policy, deduplicate
):
    rng = np.random.default_rng(seed)
    num_ranks, per_node, slots, nodes_per_leaf = shape
    trace = random_trace(rng, weights=weights, home_ranks=num_ranks)
    placement = random_placement(
        rng, num_ranks=num_ranks, ranks_per_node=per_node, slots_per_rank=slots
    )
    per_leaf = nodes_per_leaf * per_node
    groups = counted(trace, placement, dispatch, policy, deduplicate, per_leaf, 20)
    found = {
        name: np.concatenate([getattr(group, name) for group in groups])
        for name in ("dispatch", "combine", "pairs_of_ranks", "pairs", "activated")
    }
    expected = {name: np.zeros_like(values) for name, values in found.items()}
    tokens, homes = tokens_of(trace), trace.home.tolist()
    batches = [t // 20 for t in range(trace.num_tokens)]
    walked = walk(tokens, placement, homes, batches, dispatch, policy)
    cluster = Cluster(
        name="c", num_nodes=num_ranks // per_node, ranks_per_node=per_node, intra_node_gbps=1.0,
        intra_node_latency_us=0.0, inter_node_gbps=1.0, inter_node_latency_us=0.0,
    )  # fmt: skip
    transport = Transport(deduplicate)
    for t, token in enumerate(tokens):
        for layer, chosen in enumerate(token["layers"]):
            ranks = walked["served"][t][layer]
            if not ranks:
                continue
            home = gather = walked["home"][t][layer]
            if dispatch == "coherent":
                gates = [weight for _, weight in chosen]
                gather = ranks[0 if gates[0] is None else gates.index(max(gates))]
            for way, (name, center) in enumerate((("dispatch", home), ("combine", gather))):
                ends = [(center, r) if way == 0 else (r, center) for r in sorted(set(ranks))]
                for source, target in route(ends, cluster, transport, inward=way == 1):
                    table = expected[name][batches[t], layer]
                    if source == target:
                        table[3, :, source] += 1
                        continue
                    near = source // per_node == target // per_node
                    table[0 if near else 1, 0, source] += 1
                    table[0 if near else 1, 1, target] += 1
                    expected["pairs_of_ranks"][batches[t], layer, way, source, target] += 1
                    if source // per_leaf != target // per_leaf:
                        table[2, 0, source] += 1
                        table[2, 1, target] += 1
            for rank in ranks:
                expected["pairs"][batches[t], layer, rank] += 1
    for batch in set(batches):
        for layer in range(placement.num_layers):
            seen = {
                (rank, expert)
                for t in range(trace.num_tokens)
                if batches[t] == batch
                for (expert, _), rank in zip(
                    tokens[t]["layers"][layer], walked["served"][t][layer], strict=True
                )
            }
            for rank, _ in seen:
                expected["activated"][batch, layer, rank] += 1
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_messages_of_the_metrics_are_the_states_that_move(dispatch):
    rng = np.random.default_rng(3)
    trace = random_trace(rng, num_tokens=60, weights=True)
    placement = random_placement(rng)
    groups = counted(trace, placement, dispatch, "local", False, 4, 20)
    moved = sum(int(g.dispatch[:, :, :2, 0].sum()) for g in groups)
    if dispatch == "coherent":
        moved += sum(int(g.combine[:, :, :2, 0].sum()) for g in groups)
    found = measure(replay(trace, placement, dispatch=dispatch, batch_tokens=20), num_resamples=0)
    per_layer = found.values[f"messages_{dispatch}"]
    assert moved == pytest.approx(per_layer * trace.num_tokens * trace.num_layers, abs=1e-9)

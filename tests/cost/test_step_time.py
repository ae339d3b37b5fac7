"""The step-time model agrees with an independent one, and with the example in the docs."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cluster import Cluster, Network, RankFigures
from placer.cost import Transport, measure, replay, step_time
from placer.errors import UsageError
from placer.placement import Placement
from placer.trace.model import ModelDims, Trace

from .cases import chunks_of, random_placement, random_trace
from .reference_step_time import price

PARTS = (
    "dispatch_us",
    "compute_us",
    "combine_us",
    "kv_us",
    "latency_us",
    "imbalance_us",
    "total_us",
)
DIMS = ModelDims(hidden_size=128, expert_bytes=40_000, expert_flops_per_token=3e5)
CLUSTER = Cluster(
    name="test",
    num_nodes=2,
    ranks_per_node=2,
    intra_node_gbps=7.0,
    intra_node_latency_us=3.0,
    inter_node_gbps=2.0,
    inter_node_latency_us=11.0,
    hbm_gbps=50.0,
    flops=1e12,
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.booleans(),
    home=st.booleans(),
    steps=st.sampled_from([0, 5]),
    mixed=st.booleans(),
    shape=st.sampled_from([(4, 2, 2), (4, 2, 3), (6, 2, 3), (6, 3, 2), (4, 4, 2), (1, 1, 8)]),
    dispatch=st.sampled_from(["alltoall", "coherent", "allgather"]),
    policy=st.sampled_from(["local", "round_robin"]),
    deduplicate=st.booleans(),
    kind=st.sampled_from(["plain", "node", "leaves", "host", "unlike", "pairs", "curve"]),
    top_k=st.sampled_from([1, 4]),
    micro=st.sampled_from([1, 2, 3]),
    per_rank=st.sampled_from([None, 3]),
)
def test_every_part_agrees_with_the_reference(
    seed, weights, home, steps, mixed, shape, dispatch, policy, deduplicate, kind, top_k, micro,
    per_rank,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    num_ranks, ranks_per_node, slots = shape
    if per_rank:
        home = True  # every rank is home of some tokens
    trace = random_trace(
        rng, weights=weights, home_ranks=num_ranks if home else 0, steps=steps, top_k=top_k
    )
    if per_rank:
        trace = replace(trace, home=np.arange(trace.num_tokens) * 7 % num_ranks)
    placement = random_placement(
        rng, num_ranks=num_ranks, ranks_per_node=ranks_per_node, slots_per_rank=slots
    )
    cluster = cluster_of(kind, rng, num_ranks // ranks_per_node, ranks_per_node)
    transport = Transport(deduplicate, 1, 2, kv_bytes_per_token=900.0)
    found = step_time(
        trace,
        placement,
        cluster,
        dispatch=dispatch,
        dims=DIMS,
        transport=transport,
        replica_policy=policy,
        batch_tokens=17,
        mixed_batches=mixed,
        tokens_per_rank=per_rank,
        num_micro_batches=micro,
    )
    expected = price(
        trace, placement, cluster, dispatch=dispatch, dims=DIMS, transport=transport,
        policy=policy, batch_tokens=17, mixed=mixed, tokens_per_rank=per_rank, parts=micro,
    )  # fmt: skip
    assert found.missing == ()
    assert found.compute_by == ("measured curve" if kind == "curve" else "roofline")
    assert found.num_tokens.size == len(expected) > 0
    for part in PARTS:
        values = [batch[part] for batch in expected]
        np.testing.assert_allclose(getattr(found, part), values, rtol=1e-9, atol=1e-9, err_msg=part)


def cluster_of(kind, rng, num_nodes, ranks_per_node):
    """The test's cluster with one more thing that a cluster can have."""
    cluster = replace(CLUSTER, num_nodes=num_nodes, ranks_per_node=ranks_per_node)
    num_ranks = num_nodes * ranks_per_node
    if kind == "node":
        return replace(cluster, inter_node_scope="node", peer_latency_us=1.5)
    if kind == "leaves":
        return replace(cluster, network=Network(nodes_per_leaf=2, oversubscription=3.0,
                                                spine_latency_us=2.5))  # fmt: skip
    if kind == "host":
        return replace(
            cluster,
            intra_node_shared_gbps=5.0,
            same_rank_gbps=4.0,
            compute_overlap=0.3,
            ranks_at_full_speed=1.5,
            compute_latency_us=2.0,
            expert_latency_us=0.7,
        )
    if kind == "unlike":
        slow = RankFigures(ranks=(num_ranks - 1,), flops=3e11, inter_node_gbps=1.0)
        fast = RankFigures(ranks=(0,), hbm_gbps=99.0, intra_node_gbps=20.0)
        return replace(cluster, rank_figures=(slow, fast) if num_ranks > 1 else (slow,))
    if kind == "curve":
        return replace(
            cluster,
            curve_pairs=(1, 3, 4),
            curve_us=(2.0, 2.5, 4.0),
            curve_expert_bytes=DIMS.expert_bytes,
            compute_latency_us=1.0,
            ranks_at_full_speed=1.5,
        )
    if kind == "pairs":
        tables = [rng.uniform(1, 9, (num_ranks, num_ranks)).tolist() for _ in range(2)]
        gbps, latency = (tuple(map(tuple, table)) for table in tables)
        return replace(
            cluster,
            pair_gbps=gbps,
            pair_latency_us=latency,
            network=Network(nodes_per_leaf=1, oversubscription=2.0),
        )
    return cluster


def worked_example():
    """docs/metrics.md, "An example by hand": 3 tokens, 1 layer, 4 experts on 2 nodes x 2 ranks."""
    experts = np.array([[[0, 1]], [[0, 3]], [[2, 3]]], np.int16)
    trace = Trace(
        experts=experts,
        num_experts=4,
        layer_ids=np.array([0]),
        request=np.array([0, 1, 0]),
        position=np.array([0, 0, 1]),
        phase=np.ones(3, np.uint8),
    )
    placement = Placement(np.array([[0, 1, 2, 3]]), 4, 4, 2)
    cluster = Cluster(
        name="example",
        num_nodes=2,
        ranks_per_node=2,
        intra_node_gbps=100.0,
        intra_node_latency_us=2.0,
        inter_node_gbps=10.0,
        inter_node_latency_us=5.0,
        hbm_gbps=1000.0,
        flops=1e12,
    )
    dims = ModelDims(hidden_size=1000, expert_bytes=10_000_000, expert_flops_per_token=20_000_000.0)
    return trace, placement, cluster, dims


def test_the_example_by_hand_metrics():
    trace, placement, _, _ = worked_example()
    found = measure(replay(trace, placement), num_resamples=0).values
    assert found["span"] == 2
    assert found["messages_alltoall"] == pytest.approx(5 / 3)
    assert found["messages_coherent"] == pytest.approx(8 / 3)
    assert found["node_span"] == found["imbalance"] == pytest.approx(4 / 3)


def parts_of(found):
    return {part: float(getattr(found, part)[0]) for part in PARTS}


def test_the_example_by_hand_alltoall():
    trace, placement, cluster, dims = worked_example()
    found = step_time(trace, placement, cluster, dims=dims, mixed_batches=False)
    assert parts_of(found) == pytest.approx(
        {
            "dispatch_us": 5.4,
            "compute_us": 40.0,
            "combine_us": 5.4,
            "kv_us": 0.0,
            "latency_us": 10.0,
            "imbalance_us": 10.0,
            "total_us": 50.8,
        }
    )
    assert found.bottleneck_rank.tolist() == [0]


def test_the_example_by_hand_with_node_level_copies():
    trace, placement, cluster, dims = worked_example()
    found = step_time(
        trace,
        placement,
        cluster,
        dims=dims,
        transport=Transport(deduplicate_nodes=True),
        mixed_batches=False,
    )
    assert parts_of(found) == pytest.approx(
        {
            "dispatch_us": 7.2,
            "compute_us": 40.0,
            "combine_us": 7.2,
            "kv_us": 0.0,
            "latency_us": 14.0,
            "imbalance_us": 10.0,
            "total_us": 54.4,
        }
    )


def test_the_example_by_hand_coherent():
    trace, placement, cluster, dims = worked_example()
    found = step_time(
        trace,
        placement,
        cluster,
        dispatch="coherent",
        dims=dims,
        transport=Transport(kv_bytes_per_token=8000),
        mixed_batches=False,
    )
    assert parts_of(found) == pytest.approx(
        {
            "dispatch_us": 5.4,
            "compute_us": 40.0,
            "combine_us": 5.2,
            "kv_us": 7.6,
            "latency_us": 17.0,
            "imbalance_us": 10.0,
            "total_us": 58.2,
        }
    )


def test_the_example_by_hand_allgather():
    trace, placement, cluster, dims = worked_example()
    found = step_time(
        trace, placement, cluster, dispatch="allgather", dims=dims, mixed_batches=False
    )
    assert parts_of(found) == pytest.approx(
        {
            "dispatch_us": 7.15,
            "compute_us": 40.0,
            "combine_us": 7.15,
            "kv_us": 0.0,
            "latency_us": 14.0,
            "imbalance_us": 10.0,
            "total_us": 54.3,
        }
    )


def test_allgather_traffic_is_the_same_under_every_placement():
    rng = np.random.default_rng(5)
    trace = random_trace(rng)
    found = [
        step_time(trace, random_placement(rng), CLUSTER, dispatch="allgather", dims=DIMS)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(found[0].dispatch_us, found[1].dispatch_us)
    np.testing.assert_array_equal(found[0].combine_us, found[1].combine_us)
    assert (found[0].compute_us != found[1].compute_us).any()


def test_coherent_top_1_brings_nothing_back():
    trace = random_trace(np.random.default_rng(6), top_k=1)
    placement = random_placement(np.random.default_rng(7))
    transport = Transport(kv_bytes_per_token=0)
    found = step_time(
        trace, placement, CLUSTER, dispatch="coherent", dims=DIMS, transport=transport
    )
    assert (found.combine_us == 0).all()
    assert (found.kv_us == 0).all()
    assert (found.dispatch_us > 0).all()


@pytest.mark.parametrize(
    ("dims", "cluster", "dispatch", "missing", "unknown"),
    [
        (ModelDims(), CLUSTER, "alltoall",
         ("hidden_size", "expert_bytes", "expert_flops_per_token"),
         ("dispatch_us", "compute_us", "combine_us", "latency_us")),
        (replace(DIMS, expert_bytes=None), CLUSTER, "alltoall",
         ("expert_bytes",), ("compute_us",)),
        (DIMS, replace(CLUSTER, hbm_gbps=None, flops=None), "alltoall",
         ("cluster hbm_gbps", "cluster flops"), ("compute_us",)),
        (DIMS, CLUSTER, "coherent", ("kv_bytes_per_token",), ("kv_us", "latency_us")),
    ],
)  # fmt: skip
def test_a_figure_without_its_dimension_is_missing_and_says_so(
    dims, cluster, dispatch, missing, unknown
):
    trace = random_trace(np.random.default_rng(1))
    placement = random_placement(np.random.default_rng(2))
    found = step_time(trace, placement, cluster, dispatch=dispatch, dims=dims)
    assert found.missing == missing
    assert found.total_us is None
    for part in PARTS[:-1]:
        gone = part in unknown or (part == "imbalance_us" and "compute_us" in unknown)
        assert (getattr(found, part) is None) == gone, part
    summary = found.summary()
    assert summary["modelled"] is True
    assert summary["total_us"] is None
    assert summary["missing"] == list(missing)


def test_shares_add_up_and_bottlenecks_are_named():
    trace, placement, cluster, dims = worked_example()
    found = step_time(trace, placement, cluster, dims=dims, mixed_batches=False)
    shares = found.shares()
    assert shares == pytest.approx(
        {
            "transfer": 0.8 / 50.8,
            "latency": 10 / 50.8,
            "compute": 30 / 50.8,
            "imbalance": 10 / 50.8,
            "hidden": 0.0,
        }
    )
    summary = found.summary()
    assert summary["total_us_p50"] == summary["total_us_p99"] == pytest.approx(50.8)
    assert summary["bottleneck"]["rank"]["name"] == "0"
    assert summary["bottleneck"]["link"] == {"name": "rank 0 network send", "share": 0.5}
    assert summary["tokens_per_batch"] == 3


def test_two_micro_batches_hide_at_most_the_smaller_of_transfers_and_computation():
    rng = np.random.default_rng(8)
    trace = random_trace(rng, num_tokens=240, num_requests=40, variable_k=False)
    placement = random_placement(rng)
    options = {"dims": DIMS, "batch_tokens": 60}
    alone = step_time(trace, placement, CLUSTER, **options)
    found = step_time(trace, placement, CLUSTER, num_micro_batches=2, **options)
    moved = found.dispatch_us + found.combine_us
    work = moved + found.compute_us
    assert (found.total_us < work).all()
    assert (found.total_us >= np.maximum(moved, found.compute_us) * (1 - 1e-12)).all()
    assert (work > alone.total_us).all()  # two latencies, weights read twice
    assert found.shares()["hidden"] > 0
    assert alone.shares()["hidden"] == pytest.approx(0, abs=1e-12)


def test_an_oversubscribed_spine_is_paid_for_by_transfers_between_leaves_only():
    experts = np.array([[[2]], [[2]]], np.int16)  # both tokens from node 0 to node 1
    trace = replace(
        worked_example()[0], experts=experts, request=np.zeros(2, int), position=np.arange(2)
    )
    _, placement, cluster, dims = worked_example()
    near = replace(cluster, network=Network(nodes_per_leaf=2, oversubscription=8.0))
    far = replace(cluster, network=Network(nodes_per_leaf=1, oversubscription=8.0))
    times = [
        step_time(trace, placement, which, dims=dims, mixed_batches=False).dispatch_us[0]
        for which in (cluster, near, far)
    ]
    # 2 states of 2000 bytes at 10 GB/s; the leaf's uplink: 2 ranks x 10 GB/s / 8 = 2.5 GB/s
    assert times == pytest.approx([5.4, 5.4, 5 + 1.6])


def test_batches_per_rank_need_a_full_one():
    trace = random_trace(np.random.default_rng(1))
    placement = random_placement(np.random.default_rng(2))
    with pytest.raises(UsageError, match=r"rank \d is home of \d+ tokens of this trace, fewer"):
        step_time(trace, placement, CLUSTER, dims=DIMS, tokens_per_rank=50)
    for name in ("batch_tokens", "tokens_per_rank", "num_micro_batches"):
        with pytest.raises(UsageError, match=f"{name} is 0, expected at least 1"):
            step_time(trace, placement, CLUSTER, dims=DIMS, **{name: 0})


def test_dimensions_come_from_the_trace_by_default():
    trace = replace(random_trace(np.random.default_rng(1)), model=DIMS)
    placement = random_placement(np.random.default_rng(2))
    found = step_time(trace, placement, CLUSTER)
    again = step_time(trace, placement, CLUSTER, dims=DIMS)
    np.testing.assert_array_equal(found.total_us, again.total_us)


def test_chunks_and_groups_of_batches_change_nothing(monkeypatch):
    trace = random_trace(np.random.default_rng(3), steps=9)
    placement = random_placement(np.random.default_rng(4))
    whole = step_time(trace, placement, CLUSTER, dims=DIMS)
    monkeypatch.setattr(sys.modules["placer.cost.walking"], "_GROUP_BYTES", 1)
    parts = step_time(chunks_of(trace, [13, 1, 20]), placement, CLUSTER, dims=DIMS)
    np.testing.assert_array_equal(whole.total_us, parts.total_us)
    np.testing.assert_array_equal(whole.bottleneck_rank, parts.bottleneck_rank)


def test_an_empty_trace_has_no_batches():
    trace = random_trace(np.random.default_rng(1), num_tokens=0)
    found = step_time(trace, random_placement(np.random.default_rng(2)), CLUSTER, dims=DIMS)
    assert found.num_tokens.size == 0
    assert found.summary()["total_us"] is None


def test_a_cluster_of_another_shape_is_refused():
    trace = random_trace(np.random.default_rng(1))
    placement = random_placement(np.random.default_rng(2))
    with pytest.raises(UsageError, match="4 ranks, 2 per node; the cluster 8, 2 per node"):
        step_time(trace, placement, replace(CLUSTER, num_nodes=4), dims=DIMS)

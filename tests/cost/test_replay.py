"""The replay agrees with an independent implementation of the design's section 5."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost import METRICS, measure, replay
from placer.errors import UsageError
from placer.placement import Placement, contiguous
from placer.trace.model import Trace

from .cases import chunks_of, random_placement, random_trace
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
    shape=st.sampled_from(
        [(4, 2, 2), (4, 4, 3), (6, 3, 2), (6, 2, 3), (8, 2, 2), (1, 1, 8), (3, 1, 5), (8, 8, 1)]
    ),
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


BY_RANK = ("span", "cross_rank_fraction", "cross_rank_fraction_per_token", "imbalance")
REAL_TRACE = Path(__file__).parents[3] / "shared" / "traces" / "gpt_oss_20b_decode.npz"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 40), max_size=5),
    steps=st.sampled_from([0, 6]),
    policy=st.sampled_from(["local", "round_robin"]),
    dispatch=st.sampled_from(["alltoall", "coherent"]),
)
def test_chunking_changes_nothing(seed, sizes, steps, policy, dispatch):
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, num_tokens=100, steps=steps, weights=True)
    placement = random_placement(rng)
    options = {"replica_policy": policy, "dispatch": dispatch, "batch_tokens": 16}
    whole = replay(trace, placement, **options)
    parts = replay(chunks_of(trace, sizes), placement, **options)
    np.testing.assert_array_equal(whole.sums, parts.sums)
    np.testing.assert_array_equal(whole.loads, parts.loads)
    assert measure(whole, num_resamples=50).values == pytest.approx(
        measure(parts, num_resamples=50).values, rel=1e-13
    )
    assert whole.batches.num_batches == parts.batches.num_batches


def test_slices_and_early_closing_of_batches_change_nothing(monkeypatch):
    rng = np.random.default_rng(11)
    trace = random_trace(rng, num_tokens=300)
    trace = replace(trace, step=np.arange(300) // 9)
    placement = random_placement(rng)
    whole = replay(trace, placement)
    module = sys.modules["placer.cost.replay"]
    monkeypatch.setattr(module, "_SLICE_TOKENS", 10)
    monkeypatch.setattr(sys.modules["placer.cost.batches"], "_OPEN_BYTES", 0)
    monkeypatch.setattr(sys.modules["placer.cost.batches"], "_LEAST_OPEN", 3)
    parts = replay(trace, placement)
    np.testing.assert_array_equal(whole.sums, parts.sums)
    np.testing.assert_array_equal(whole.batches.imbalance, parts.batches.imbalance)


def test_mixed_batches_of_a_long_trace_use_its_first_tokens(monkeypatch):
    rng = np.random.default_rng(12)
    trace = random_trace(rng, num_tokens=200)
    placement = random_placement(rng)
    monkeypatch.setattr(sys.modules["placer.cost.replay"], "_MIXED_TOKENS", 90)
    found = replay(chunks_of(trace, [50, 60]), placement, batch_tokens=16)
    first = replay(trace.select(np.arange(200) < 90), placement, batch_tokens=16)
    np.testing.assert_array_equal(found.mixed_batches.imbalance, first.mixed_batches.imbalance)
    assert found.mixed_batches.how.endswith("(of the first 90 tokens)")
    assert replay(trace, placement, mixed_batches=False).mixed_batches is None


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), policy=st.sampled_from(["local", "round_robin"]))
def test_relabelling_experts_changes_nothing(seed, policy):
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, weights=True)
    placement = random_placement(rng)
    new = np.append(rng.permutation(8), -1)  # new[-1] = -1: unused stays unused
    renamed = replace(trace, experts=new[trace.experts])
    moved = replace(placement, physical_to_logical=new[placement.physical_to_logical])
    assert figures(renamed, moved, replica_policy=policy) == figures(
        trace, placement, replica_policy=policy
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_permuting_whole_ranks_leaves_what_does_not_look_at_homes(seed):
    rng = np.random.default_rng(seed)
    trace = random_trace(rng)
    placement = random_placement(rng, slots_per_rank=2)  # no replicas: homes decide nothing
    order = rng.permutation(4)
    table = placement.physical_to_logical.reshape(4, 4, 2)[:, order].reshape(4, 8)
    before = figures(trace, placement)
    after = figures(trace, replace(placement, physical_to_logical=table))
    for name in BY_RANK:
        assert after[name] == pytest.approx(before[name], rel=1e-13), name


def test_every_rank_with_every_expert_sends_nothing():
    trace = random_trace(np.random.default_rng(1), weights=True)
    placement = Placement(np.tile(np.arange(8), (4, 4)), 8, 4, 2)
    found = figures(trace, placement)
    assert found["messages_alltoall"] == found["messages_coherent"] == 0
    assert found["node_messages_alltoall"] == found["cross_rank_fraction"] == 0


def test_which_copy_serves_decides_traffic_under_local_only():
    rng = np.random.default_rng(2)
    trace = random_trace(rng, num_tokens=400, variable_k=False)
    placement = random_placement(rng, slots_per_rank=4)
    local = figures(trace, placement)
    in_turn = figures(trace, placement, replica_policy="round_robin")
    assert local["messages_alltoall"] < 0.9 * in_turn["messages_alltoall"]
    assert local["span"] < in_turn["span"]


def test_tokens_without_experts_count_as_token_layers_and_send_nothing():
    experts = np.full((2, 3, 2), -1, np.int16)
    experts[0, 0, 0] = 2  # request 0 at home on rank 0; expert 2 is on rank 1
    experts[0, 2] = (1, 2)
    trace = Trace(
        experts, 4, np.arange(3), np.zeros(2, np.int64), np.arange(2), np.ones(2, np.uint8)
    )
    found = figures(trace, contiguous(3, 4, 2, 2, 1))
    assert found["span"] == (1 + 2) / 6
    assert found["messages_alltoall"] == (1 + 1) / 6
    # Layer 0 moves the home to rank 1, layer 1 leaves it there: 1, then 1 + 2 - 1.
    assert found["messages_coherent"] == (1 + 2) / 6
    assert found["cross_rank_fraction"] is None  # no two consecutive layers with experts


def test_an_empty_trace_has_no_figures():
    trace = random_trace(np.random.default_rng(1), num_tokens=0)
    found = measure(replay(trace, contiguous(4, 8, 4, 2, 2)))
    assert set(found.values.values()) == {None}
    assert set(found.intervals.values()) == {None}


def test_more_than_2048_requests_share_blocks_and_no_token_is_lost():
    rng = np.random.default_rng(4)
    trace = random_trace(rng, num_tokens=5000, num_layers=2, num_requests=10**9)
    placement = random_placement(rng, num_layers=2)
    found = replay(chunks_of(trace, [1700, 1700]), placement, mixed_batches=False)
    assert found.num_requests == np.unique(trace.request).size > 2048
    assert found.sums.shape[0] == found.loads.shape[0] == 2048
    assert found.total("token_layers") == 10_000
    assert found.rank_load.sum() == (trace.experts >= 0).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 9}, "the trace has 4 layers of 9 experts, the placement 4 layers of 8"),
        ({"home": np.full(60, 5)}, "records home rank 5, the placement has 4 ranks"),
        ({"home": np.full(60, -1)}, "records home rank -1"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(change, message):
    trace = replace(random_trace(np.random.default_rng(1)), **change)
    with pytest.raises(UsageError, match=message):
        replay(trace, contiguous(4, 8, 4, 2, 2))


def test_homes_of_other_ranks_can_be_ignored():
    trace = random_trace(np.random.default_rng(1))
    placement = contiguous(4, 8, 4, 2, 2)
    elsewhere = replace(trace, home=np.full(60, 7))
    assert figures(elsewhere, placement, ignore_home=True) == figures(trace, placement)


def test_nonsense_is_refused():
    trace = random_trace(np.random.default_rng(1))
    placement = contiguous(4, 8, 4, 2, 2)
    with pytest.raises(UsageError, match="batch_tokens is 0"):
        replay(trace, placement, batch_tokens=0)
    with pytest.raises(UsageError, match="unknown 'telepathy'"):
        replay(trace, placement, dispatch="telepathy")
    with pytest.raises(UsageError, match="unknown 'random'"):
        replay(trace, placement, replica_policy="random")
    with pytest.raises(UsageError, match="no chunks"):
        replay([], placement)
    with pytest.raises(UsageError, match="unsound: layer 0: no slot holds expert 7"):
        replay(trace, replace(placement, physical_to_logical=placement.physical_to_logical % 7))
    with pytest.raises(UsageError, match="some chunks"):
        replay([trace, replace(trace, step=np.zeros(60, np.int64))], placement)


@pytest.mark.skipif(not REAL_TRACE.exists(), reason="the real trace is not here")
@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [(4, (2.2700, 4.2964, 1.1630)), (8, (3.1390, 5.7287, 1.4283))],
)
def test_contiguous_figures_of_the_real_trace(num_ranks, expected):
    with np.load(REAL_TRACE) as file:
        request = file["request"].astype(np.int64)
        trace = Trace(
            file["experts"],
            32,
            file["layer_ids"],
            request,
            file["position"].astype(np.int64),
            file["phase"],
        )
    placement = contiguous(24, 32, num_ranks, 32 // num_ranks, num_ranks)
    found = figures(trace, placement, mixed_batches=False)
    names = ("messages_alltoall", "messages_coherent", "imbalance")
    assert [found[name] for name in names] == pytest.approx(expected, abs=5e-5)

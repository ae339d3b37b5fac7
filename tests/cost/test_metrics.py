"""Intervals and paired comparisons say what they claim to say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from placer.cost import METRICS, compare, measure, replay
from placer.cost.intervals import (
    basic,
    basic_of_inverse,
    jackknife,
    percentile,
    resample_counts,
    student_t,
)
from placer.cost.metrics import balancedness_of, imbalance_of
from placer.errors import UsageError
from placer.placement import contiguous

from .cases import chunks_of, random_placement, random_trace

IN_BOOTSTRAP = ("span", "messages_coherent", "cross_rank_fraction", "imbalance", "balancedness")


def spread_trace(rng, num_requests, tokens_each=20):
    """Requests with tastes of their own, so that figures differ between requests."""
    trace = random_trace(rng, num_tokens=num_requests * tokens_each, variable_k=False)
    taste = np.exp(rng.normal(size=(num_requests, 8)))
    experts = np.empty_like(trace.experts)
    for request in range(num_requests):
        keys = rng.exponential(size=(tokens_each, 4, 8)) / taste[request]
        tokens = slice(request * tokens_each, (request + 1) * tokens_each)
        experts[tokens] = np.argsort(keys, axis=2)[:, :, :3]
    return replace(trace, experts=experts, request=np.repeat(np.arange(num_requests), tokens_each))


def test_the_table_of_metrics_is_complete():
    names = [info.name for info in METRICS]
    assert len(set(names)) == len(names)
    assert all(info.description and info.better in ("lower", "higher") for info in METRICS)
    rng = np.random.default_rng(1)
    found = measure(replay(random_trace(rng), random_placement(rng)), num_resamples=20)
    assert list(found.values) == list(found.intervals) == names


def test_a_resample_is_the_trace_with_requests_repeated():
    """The weighted sums give what replaying the resampled requests gives."""
    rng = np.random.default_rng(2)
    trace = spread_trace(rng, 7)
    placement = random_placement(rng, slots_per_rank=2)
    counts = resample_counts(7, 3, seed=5)
    assert (counts.sum(axis=1) == 7).all()
    found = replay(trace, placement)
    for row in counts:
        again = np.repeat(np.arange(7), row.astype(int))
        tokens = np.concatenate([np.flatnonzero(trace.request == r) for r in again])
        home = trace.request[tokens] % 4
        copy = replace(trace.select(tokens), request=np.arange(tokens.size), home=home)
        expected = measure(replay(copy, placement), num_resamples=0).values
        sums = row @ found.sums
        assert sums[1] / sums[0] == pytest.approx(expected["span"])
        assert sums[3] / sums[0] == pytest.approx(expected["messages_coherent"])
        loads = np.tensordot(row, found.loads.astype(float), 1)
        assert float(imbalance_of(loads)) == pytest.approx(expected["imbalance"])
        assert float(balancedness_of(loads)) == pytest.approx(expected["balancedness"])


def test_values_lie_in_their_intervals_and_intervals_within_bounds():
    rng = np.random.default_rng(3)
    found = measure(replay(spread_trace(rng, 30), contiguous(4, 8, 4, 2, 2), batch_tokens=40))
    for info in METRICS:
        low, high = found.intervals[info.name]
        assert info.bounds[0] <= low <= found.values[info.name] <= high <= info.bounds[1]
    assert found.intervals["messages_alltoall"][0] < found.intervals["messages_alltoall"][1]


def test_the_same_seed_gives_the_same_intervals_and_another_does_not():
    rng = np.random.default_rng(4)
    done = replay(spread_trace(rng, 12), contiguous(4, 8, 4, 2, 2))
    assert measure(done, seed=1).intervals == measure(done, seed=1).intervals
    assert measure(done, seed=1).intervals["span"] != measure(done, seed=2).intervals["span"]


def test_one_request_has_no_interval():
    rng = np.random.default_rng(5)
    trace = random_trace(rng, num_requests=1)
    plan, other = random_placement(rng), random_placement(rng)
    found = measure(replay(trace, plan))
    assert set(found.intervals.values()) == {None}
    assert found.values["span"] is not None
    changes = compare(replay(trace, plan), replay(trace, other))
    assert all(entry["change_low"] is None for entry in changes.values())
    assert changes["span"]["change"] is not None


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """120 samples of 40 requests each, from a population of 4000 requests."""
    rng = np.random.default_rng(6)
    placement = contiguous(4, 8, 4, 2, 2)
    population = replay(spread_trace(rng, 2000, 4), placement, mixed_batches=False)
    truth = measure(population, num_resamples=0).values
    hits = dict.fromkeys(IN_BOOTSTRAP, 0)
    for trial in range(120):
        drawn = rng.integers(0, 2000, 40)
        sample = replace(
            population,
            sums=population.sums[drawn],
            loads=population.loads[drawn],
            num_requests=40,
        )
        found = measure(sample, num_resamples=300, seed=trial)
        for name in hits:
            low, high = found.intervals[name]
            hits[name] += low <= truth[name] <= high
    for name, count in hits.items():
        assert 0.85 <= count / 120 <= 1.0, (name, count)
    assert min(hits.values()) < 120  # intervals are not simply wide


def test_comparing_a_plan_with_itself_finds_no_change_without_doubt():
    rng = np.random.default_rng(7)
    done = replay(spread_trace(rng, 20), random_placement(rng))
    for name, entry in compare(done, done).items():
        if entry["baseline"]:
            assert (entry["change"], entry["change_low"], entry["change_high"]) == (0, 0, 0), name


def test_a_paired_comparison_is_sharper_than_two_intervals():
    rng = np.random.default_rng(8)
    trace = spread_trace(rng, 40)
    plan = replay(trace, random_placement(rng, slots_per_rank=2), mixed_batches=False)
    baseline = replay(trace, contiguous(4, 8, 4, 2, 2), mixed_batches=False)
    entry = compare(plan, baseline)["messages_coherent"]
    assert entry["change"] == pytest.approx(entry["value"] / entry["baseline"] - 1)
    assert entry["change_low"] <= entry["change"] <= entry["change_high"]
    low, high = measure(plan).intervals["messages_coherent"]
    base_low, base_high = measure(baseline).intervals["messages_coherent"]
    unpaired = high / base_low - low / base_high
    assert entry["change_high"] - entry["change_low"] < unpaired


def test_replays_of_different_tokens_or_batches_are_not_compared():
    rng = np.random.default_rng(9)
    placement = random_placement(rng)
    trace = random_trace(rng)
    one = replay(trace, placement)
    with pytest.raises(UsageError, match="256 consecutive tokens, the other of 9 consecutive"):
        compare(one, replay(trace, placement, batch_tokens=9))
    other = replay(random_trace(rng, num_tokens=61), placement)
    with pytest.raises(UsageError, match="not of the same tokens"):
        compare(one, other)


def test_a_change_from_nothing_is_undefined():
    rng = np.random.default_rng(10)
    trace = spread_trace(rng, 10)
    one_node = replay(trace, contiguous(4, 8, 4, 2, 4))
    two_nodes = replay(trace, contiguous(4, 8, 4, 2, 2))
    entry = compare(two_nodes, one_node)["node_messages_alltoall"]
    assert entry["baseline"] == 0
    assert entry["change"] is None
    assert entry["change_low"] is None


def test_metrics_as_json_say_how_batches_were_made():
    rng = np.random.default_rng(11)
    trace = spread_trace(rng, 10)
    placement = contiguous(4, 8, 4, 2, 2)
    document = measure(replay(trace, placement, batch_tokens=50)).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["imbalance_batches_p95"]["batches"] == "50 consecutive tokens"
    mixed = document["imbalance_mixed_batches_p95"]["batches"]
    assert mixed == "50 tokens taken round-robin over requests"
    assert "batches" not in document["imbalance"]
    by_step = replace(trace, step=np.arange(trace.num_tokens) // 40)
    document = measure(replay(by_step, placement)).to_dict()
    assert document["sglang_balancedness"]["batches"] == "recorded forward passes"


def test_experts_that_fire_together_and_sit_together_show_in_consecutive_batches_only():
    """The trap of the design: balanced over the trace, unbalanced in every batch."""
    rng = np.random.default_rng(12)
    trace = random_trace(rng, num_tokens=800, num_requests=1, variable_k=False, top_k=2)
    request = np.repeat(np.arange(8), 100)
    pair = np.stack([2 * (request % 4), 2 * (request % 4) + 1], axis=1)
    experts = np.broadcast_to(pair[:, None, :], trace.experts.shape).astype(np.int16)
    trace = replace(trace, experts=experts, request=request)
    found = measure(replay(trace, contiguous(4, 8, 4, 2, 2), batch_tokens=100)).values
    assert found["imbalance"] == 1
    assert found["imbalance_batches_mean"] == 4
    assert found["imbalance_mixed_batches_mean"] == pytest.approx(1, abs=0.05)


def test_intervals_of_batches_do_not_depend_on_chunks():
    rng = np.random.default_rng(13)
    trace = spread_trace(rng, 20)
    placement = contiguous(4, 8, 4, 2, 2)
    whole = measure(replay(trace, placement, batch_tokens=30)).intervals
    parts = measure(replay(chunks_of(trace, [7, 100]), placement, batch_tokens=30)).intervals
    for name, interval in whole.items():
        assert interval == pytest.approx(parts[name], rel=1e-12), name


def test_percentile_basic_and_jackknife_by_hand():
    drawn = np.arange(101.0)
    assert percentile(drawn, 0.9) == pytest.approx((5, 95))
    assert basic(60.0, drawn, 0.9) == pytest.approx((25, 115))
    assert basic(3.0, drawn, 0.9) == pytest.approx((-89, 3))  # widened to hold the value
    assert basic_of_inverse(0.5, 1 / np.array([1.8, 2.1, 2.4]), 1.0) == pytest.approx(
        (1 / 2.2, 1 / 1.6)
    )
    assert basic_of_inverse(0.5, np.array([0.5, 0.0]), 0.9) is None
    assert percentile(np.array([1.0, np.nan]), 0.9) is None
    # Leave-one-out means of 1, 2, 3 are 2.5, 2, 1.5: the usual standard error 1 / sqrt(3).
    low, high = jackknife(2.0, np.array([2.5, 2.0, 1.5]), 0.95)
    assert high - 2 == pytest.approx(2 - low)
    assert high - 2 == pytest.approx(4.302652729911275 / np.sqrt(3))
    assert jackknife(2.0, np.array([2.0]), 0.95) is None
    assert student_t(0.975, 15) == pytest.approx(2.131449545559323)

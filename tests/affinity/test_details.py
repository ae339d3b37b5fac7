"""Segments, caches, activation, gaps, clusters and stability, each against a plain reference."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from placer.affinity.activation import activated_experts
from placer.affinity.clusters import balanced_groups, clusterability, pair_counts
from placer.affinity.details import routing_details
from placer.affinity.gaps import information_by_gap, pair_tables, scaled_affinity
from placer.affinity.jackknife import estimate
from placer.affinity.sample import NUM_GROUPS, sample_requests
from placer.affinity.segments import segment_caching, segment_routing
from placer.affinity.stability import load_stability
from placer.trace import MemorySource, make_trace

from . import reference_details as reference


def small_trace(seed=0, num_requests=20, length=24, num_experts=8, num_layers=3, top_k=3):
    """Requests with a taste of their own, 0 to K experts per token, tokens shuffled in the file."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(num_requests), length)
    taste = rng.gumbel(size=(num_requests, num_layers, num_experts))
    score = 1.5 * taste[request] + rng.gumbel(size=(request.size, num_layers, num_experts))
    experts = np.argsort(-score, axis=2)[:, :, :top_k].astype(np.int16)
    used = rng.integers(0, top_k + 1, size=(request.size, num_layers, 1))
    experts[np.arange(top_k) >= used] = -1
    position = np.tile(np.arange(length), num_requests)
    order = rng.permutation(request.size)
    return make_trace(
        experts=experts[order],
        num_experts=num_experts,
        request=request[order],
        position=position[order],
        phase=(position[order] >= length // 2).astype(np.uint8),
    )


@pytest.fixture(scope="module")
def trace():
    return small_trace()


@pytest.fixture(scope="module")
def sample(trace):
    return sample_requests(MemorySource(trace))


def test_a_sample_holds_whole_requests_in_order(trace):
    drawn = sample_requests(MemorySource(trace), 100)
    assert drawn.of_tokens == 480
    assert drawn.of_requests == 20
    assert drawn.num_requests == 5  # 4 x 24 < 100 <= 5 x 24
    assert np.diff(drawn.starts).tolist() == [24] * 5
    assert drawn.trace.position.tolist() == list(range(24)) * 5
    assert np.bincount(drawn.group_of_request).max() == 1
    whole = sample_requests(MemorySource(trace))
    assert np.bincount(whole.group_of_request, minlength=NUM_GROUPS).tolist() == [2] * 4 + [1] * 12


def test_segment_routing_tries_every_threshold(trace, sample):
    found = segment_routing(sample)
    assert [entry["segment_tokens"] for entry in found] == [4, 16]  # 24 tokens hold no 64
    for entry in found:
        value, threshold, kept = reference.srp(trace, entry["segment_tokens"])
        assert entry["srp"]["value"] == pytest.approx(value, abs=1e-12)
        assert entry["threshold"] == threshold
        assert entry["experts_kept"] == pytest.approx(kept, abs=1e-12)
        assert entry["srp"]["low"] < value < entry["srp"]["high"]
        assert entry["srp_by_chance"] < value


def test_caches_follow_their_rule(trace, sample):
    found = segment_caching(sample)
    sizes = [entry["cache_experts"] for entry in found]
    assert sizes == [2, 4]  # 2.0 experts per token where any; 8 would hold all
    for entry in found:
        size = entry["cache_experts"]
        assert entry["sch"]["value"] == pytest.approx(reference.hit_rate(trace, size, 16))
        assert entry["lru"]["value"] == pytest.approx(reference.hit_rate(trace, size, 0))
        assert entry["lru"]["value"] <= entry["sch"]["value"]
        assert entry["sch"]["low"] < entry["sch"]["value"] < entry["sch"]["high"]


def test_a_router_that_never_changes_needs_no_more_than_its_experts():
    experts = np.tile(np.array([[[0, 1], [2, 3]]]), (40, 1, 1))
    fixed = make_trace(experts=experts, num_experts=8, request=np.arange(40) // 20)
    found = sample_requests(MemorySource(fixed))
    assert [entry["srp"]["value"] for entry in segment_routing(found)] == [1.0, 1.0]
    assert segment_caching(found)[0]["lru"]["value"] == 1.0
    assert all(entry["activated"]["value"] == 2.0 for entry in activated_experts(found))


def test_activation_counts_distinct_experts_of_decode_batches(trace, sample):
    found = activated_experts(sample)
    assert [entry["batch_tokens"] for entry in found] == [1, 2, 4, 8, 16, 32]  # 240 tokens
    chosen = (trace.experts[trace.phase == 1] >= 0).sum() / 240 / 3
    for entry in found:
        size = entry["batch_tokens"]
        expected = reference.mean_activated(trace, size)
        assert entry["activated"]["value"] == pytest.approx(expected)
        assert entry["share"] == pytest.approx(expected / 8)
        assert entry["tokens_per_expert"] == pytest.approx(size * chosen / expected)
        assert entry["bytes_per_token"] is None
    share = [
        [(trace.experts[trace.phase == 1][:, layer] == e).any(axis=1).mean() for e in range(8)]
        for layer in range(3)
    ]
    drawn = [sum(1 - (1 - p) ** 8 for p in row) for row in share]
    assert found[3]["independent"] == pytest.approx(sum(drawn) / 3)


def test_information_by_gap_is_that_of_primary_experts(trace, sample):
    found = information_by_gap(sample)
    assert [entry["gap"] for entry in found] == [1, 2]
    primary = trace.primary()
    for entry in found:
        gap = entry["gap"]
        raw = np.mean(
            [
                reference.nmi(
                    [
                        (a, b)
                        for a, b in zip(
                            primary[:, layer].tolist(),
                            primary[:, layer + gap].tolist(),
                            strict=True,
                        )
                        if a >= 0 and b >= 0
                    ]
                )
                for layer in range(3 - gap)
            ]
        )
        assert entry["nmi"]["value"] < raw  # corrected for chance
        assert entry["nmi"]["value"] == pytest.approx(raw, abs=0.06)
        assert entry["nmi"]["low"] < entry["nmi"]["value"] < entry["nmi"]["high"]


def test_independent_layers_have_no_information_whatever_the_gap():
    rng = np.random.default_rng(5)
    experts = rng.integers(0, 8, size=(4000, 6, 1))
    drawn = make_trace(experts=experts, num_experts=8, request=np.arange(4000) // 40)
    found = sample_requests(MemorySource(drawn))
    for entry in information_by_gap(found):
        assert abs(entry["nmi"]["value"]) < 0.003
    scaled = scaled_affinity(found)
    assert abs(scaled["held_out"]["value"]) < 0.02


def test_scaled_affinity_guesses_the_next_expert_from_the_other_half(trace, sample):
    primary = sample.trace.primary().tolist()
    half = (sample.group_of_token % 2).tolist()
    right = total = 0
    for layer, side in itertools.product(range(2), range(2)):
        table = np.zeros((8, 8))
        for row, h in zip(primary, half, strict=True):
            if h != side and row[layer] >= 0 and row[layer + 1] >= 0:
                table[row[layer], row[layer + 1]] += 1
        for row, h in zip(primary, half, strict=True):
            if h == side and row[layer] >= 0 and row[layer + 1] >= 0:
                total += 1
                right += int(table[row[layer]].argmax()) == row[layer + 1]
    found = scaled_affinity(sample)
    assert found["held_out"]["value"] == pytest.approx((right / total - 1 / 8) / (1 - 1 / 8))
    assert found["held_out"]["low"] < found["held_out"]["value"] < found["held_out"]["high"]


def test_a_fixed_successor_is_affinity_one():
    first = np.random.default_rng(3).integers(0, 8, 2000)
    experts = np.stack([first, (first + 3) % 8, (first * 5) % 8], axis=1)[:, :, None]
    chained = make_trace(experts=experts, num_experts=8, request=np.arange(2000) // 20)
    found = sample_requests(MemorySource(chained))
    assert scaled_affinity(found)["held_out"]["value"] == pytest.approx(1.0)
    assert information_by_gap(found)[1]["nmi"]["value"] == pytest.approx(1.0)


def test_clusters_are_judged_by_the_other_half(trace, sample):
    found = clusterability(sample, [2])[0]
    ids = sample.trace.request[sample.starts[:-1]]
    kept = total = 0
    for side in (0, 1):
        judged = set(ids[sample.group_of_request % 2 == side].tolist())
        fitted = [
            pair_counts(sample, layer)[np.arange(NUM_GROUPS) % 2 != side].sum(axis=0)
            for layer in range(3)
        ]
        groups = [balanced_groups(table, 2).tolist() for table in fitted]
        more = reference.kept_share(trace, groups, judged)
        kept, total = kept + more[0], total + more[1]
    assert found["kept"]["value"] == pytest.approx(kept / total)
    assert found["kept_at_random"] == pytest.approx(3 / 7)
    assert found["kept"]["value"] <= found["kept_bound"] <= 1
    assert found["scaled"] == pytest.approx((kept / total - 3 / 7) / (4 / 7))


def test_the_best_groups_of_a_small_layer_are_found():
    rng = np.random.default_rng(2)
    for _ in range(20):
        block = np.kron(np.eye(2), np.full((3, 3), 5.0)) + rng.random((6, 6))
        order = rng.permutation(6)
        weight = (block + block.T)[np.ix_(order, order)]
        groups = balanced_groups(weight, 2)
        kept = weight[groups[:, None] == groups[None, :]].sum() - np.trace(weight)
        best = max(
            sum(weight[a, b] for side in (part, rest) for a in side for b in side if a != b)
            for part in itertools.combinations(range(6), 3)
            for rest in [tuple(set(range(6)) - set(part))]
        )
        assert kept == pytest.approx(best)


def test_stability_compares_windows_of_requests(trace):
    found = load_stability(MemorySource(trace))
    window = trace.request * 8 // 20  # all requests are as long; by their middle
    window = np.minimum(((trace.request + 0.5) * 8 / 20).astype(int), 7)
    for entry in found["by_lag"]:
        distances = []
        for w, layer in itertools.product(range(8 - entry["lag"]), range(3)):
            shares = []
            for which in (w, w + entry["lag"]):
                ids = trace.experts[window == which][:, layer].ravel().tolist()
                ids = [e for e in ids if e >= 0]
                shares.append([ids.count(e) / len(ids) for e in range(8)])
            distances.append(sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2)
        assert entry["total_variation"]["value"] == pytest.approx(sum(distances) / len(distances))
    assert found["request_effect"] > 1.5  # tokens of one request are alike


def test_a_drifting_load_passes_the_floor_and_a_steady_one_does_not():
    rng = np.random.default_rng(4)
    request = np.repeat(np.arange(64), 20)
    steady = rng.integers(0, 8, size=(request.size, 2, 1))
    moving = (steady // 4 + (request[:, None, None] * 8 // 64)) % 8
    for experts, drifts in ((steady, False), (moving, True)):
        found = load_stability(
            MemorySource(make_trace(experts=experts, num_experts=8, request=request))
        )
        assert (found["by_lag"][3]["total_variation"]["low"] > found["floor"]) == drifts


def test_one_request_gives_figures_without_intervals():
    trace = small_trace(num_requests=1, length=200)
    document = routing_details(MemorySource(trace), [2, 4])
    assert document["stability"] is None
    assert document["segments"][0]["srp"]["low"] is None
    assert document["information_by_gap"][0]["nmi"]["low"] is None
    json.dumps(document, allow_nan=False)


def test_a_trace_without_experts_gives_no_figures():
    experts = np.full((40, 2, 2), -1)
    document = routing_details(
        MemorySource(make_trace(experts=experts, num_experts=4, request=np.arange(40))), [2]
    )
    assert document["caches"] == document["clusters"] == []
    json.dumps(document, allow_nan=False)


def test_one_layer_and_top_one_are_fine():
    experts = np.random.default_rng(0).integers(0, 6, size=(400, 1, 1))
    one = make_trace(experts=experts, num_experts=6, request=np.arange(400) // 10)
    document = routing_details(MemorySource(one), [2, 3])
    assert document["information_by_gap"] == []
    assert document["clusters"] == []
    assert document["scaled_affinity"]["by_load"] is None
    json.dumps(document, allow_nan=False)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).normal(size=16)
    without = (values.sum() - values) / 15
    found = estimate(float(values.mean()), without)
    error = values.std(ddof=1) / 4
    assert found["high"] - found["value"] == pytest.approx(2.131449546 * error)


def test_pairs_are_counted_by_group(sample):
    primary = sample.trace.primary()
    tables = pair_tables(sample, primary, 0, 2)
    expected = np.zeros_like(tables)
    for group, row in zip(sample.group_of_token.tolist(), primary.tolist(), strict=True):
        if row[0] >= 0 and row[2] >= 0:
            expected[group, row[0], row[2]] += 1
    np.testing.assert_array_equal(tables, expected)

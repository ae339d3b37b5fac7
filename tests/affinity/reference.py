"""The definitions of the counts, written plainly, and random traces to try them on."""

from __future__ import annotations

import itertools

import numpy as np

from placer.affinity import Affinity
from placer.trace.model import Trace


def trace_of(experts, num_experts, *, weights=None, request=None, phase=None, labels=None):
    """A trace of `experts` [T, L, K]; every field that is not given is zero."""
    experts = np.asarray(experts)
    num_tokens, num_layers, _ = experts.shape
    return Trace(
        experts=experts,
        num_experts=num_experts,
        layer_ids=np.arange(num_layers) * 2 + 1,
        request=np.zeros(num_tokens, np.int64) if request is None else np.asarray(request),
        position=np.arange(num_tokens),
        phase=np.zeros(num_tokens, np.uint8) if phase is None else np.asarray(phase, np.uint8),
        weights=weights,
        labels=labels or {},
    )


def random_trace(
    seed=0, *, num_tokens=40, num_layers=3, num_experts=6, top_k=3,
    variable_k=False, weighted=False, dtype=np.int16, **fields,
):  # fmt: skip
    """A trace with skewed independent choices; with `variable_k`, 0 to K experts per token."""
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(num_tokens, num_layers, num_experts))
    noise += np.linspace(2, 0, num_experts)
    experts = np.argsort(-noise, axis=2)[:, :, :top_k].astype(dtype)
    if variable_k:
        used = rng.integers(0, top_k + 1, size=(num_tokens, num_layers, 1))
        experts[np.arange(top_k) >= used] = -1
    weights = None
    if weighted:
        weights = rng.random(experts.shape).round(1).astype(np.float32)
        weights[experts < 0] = 0
    return trace_of(experts, num_experts, weights=weights, **fields)


def reference_count(trace: Trace) -> Affinity:
    num_layers, num_experts = trace.num_layers, trace.num_experts
    between = (max(num_layers - 1, 0), num_experts, num_experts)
    coactivation = np.zeros((num_layers, num_experts, num_experts), np.int64)
    affinity = np.zeros(between)
    primary_affinity = np.zeros(between, np.int64)
    primary_pairs = np.zeros(between, np.int64)
    histogram = np.zeros((num_layers, trace.top_k + 1), np.int64)
    primaries = trace.primary()
    for token, primary in zip(trace.experts.tolist(), primaries.tolist(), strict=True):
        chosen = [[expert for expert in row if expert >= 0] for row in token]
        for layer, here in enumerate(chosen):
            histogram[layer, len(here)] += 1
            for a in here:
                for b in here:
                    coactivation[layer, a, b] += 1
        for layer, (here, after) in enumerate(itertools.pairwise(chosen)):
            for a in here:
                for b in after:
                    affinity[layer, a, b] += 1 / (len(here) * len(after))
            if here:
                for b in after:
                    primary_affinity[layer, primary[layer], b] += 1
                if after:
                    primary_pairs[layer, primary[layer], primary[layer + 1]] += 1
    return Affinity(
        layer_ids=trace.layer_ids,
        coactivation=coactivation,
        affinity=affinity,
        primary_affinity=primary_affinity,
        primary_pairs=primary_pairs,
        k_histogram=histogram,
    )


def assert_same(found: Affinity, expected: Affinity) -> None:
    for name in ("layer_ids", "coactivation", "primary_affinity", "primary_pairs", "k_histogram"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.affinity, expected.affinity, rtol=1e-12, atol=1e-12)

"""Counts: equal to their definition, additive over tokens, independent of chunks and threads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity import (
    AffinityCounter,
    blocks,
    count,
    count_by,
    count_chunks,
    counts,
    label_of,
    phase_of,
)

from .reference import assert_same, random_trace, reference_count, trace_of

SHAPES = {
    "usual": {},
    "one layer": {"num_layers": 1},
    "top-1": {"top_k": 1},
    "one expert": {"num_experts": 1, "top_k": 1},
    "all experts": {"num_experts": 3, "top_k": 3},
    "one token": {"num_tokens": 1},
    "no tokens": {"num_tokens": 0},
    "wide ids": {"num_experts": 512, "top_k": 8, "dtype": np.int32},
    "beyond a byte": {"num_experts": 300, "top_k": 8},
}


@pytest.mark.parametrize("variable_k", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_counts_equal_their_definition(shape, weighted, variable_k):
    trace = random_trace(3, weighted=weighted, variable_k=variable_k, **shape)
    assert_same(count(trace), reference_count(trace))


def test_load_is_the_diagonal_of_coactivation_and_tokens_come_from_the_histogram():
    trace = random_trace(variable_k=True)
    counts = count(trace)
    for layer in range(trace.num_layers):
        ids = trace.experts[:, layer]
        expected = np.bincount(ids[ids >= 0], minlength=trace.num_experts)
        np.testing.assert_array_equal(counts.load[layer], expected)
        assert counts.tokens[layer] == (ids[:, 0] >= 0).sum()
    assert counts.num_tokens == trace.num_tokens
    assert counts.num_experts == trace.num_experts
    assert counts.top_k == trace.top_k


def test_every_token_adds_one_to_the_affinity_of_each_pair_of_layers():
    trace = random_trace(variable_k=True, num_tokens=200)
    both = (trace.experts[:, :-1, 0] >= 0) & (trace.experts[:, 1:, 0] >= 0)
    total = count(trace).affinity.sum(axis=(1, 2))
    np.testing.assert_allclose(total, both.sum(axis=0), rtol=1e-12)


@given(
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(0, 30),
    variable_k=st.booleans(),
    weighted=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_add_up_to_the_whole(seed, cut, variable_k, weighted):
    trace = random_trace(seed, num_tokens=30, variable_k=variable_k, weighted=weighted)
    first = np.arange(trace.num_tokens) < cut
    parts = count(trace.select(first)) + count(trace.select(~first))
    assert_same(parts, count(trace))


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=40, deadline=None)
def test_relabelling_experts_permutes_the_tables(seed, data):
    trace = random_trace(seed, num_tokens=20, variable_k=True)
    new_id = np.array(data.draw(st.permutations(range(trace.num_experts))))
    renamed = np.where(trace.experts < 0, -1, new_id[trace.experts]).astype(np.int16)
    found = count(dataclasses.replace(trace, experts=renamed))
    expected = count(trace)
    for name in ("coactivation", "affinity", "primary_affinity", "primary_pairs"):
        permuted = getattr(found, name)[:, new_id][:, :, new_id]
        np.testing.assert_array_equal(permuted, getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("top_k", [3, 6, 7, 8])
def test_chunks_and_threads_change_no_bit(top_k):
    trace = random_trace(num_tokens=500, num_experts=12, top_k=top_k, variable_k=True)
    whole = count(trace, threads=1)
    token = np.arange(trace.num_tokens)
    pieces = [trace.select((token >= cut) & (token < cut + 90)) for cut in range(0, 500, 90)]
    seen = []
    chunked = count_chunks(iter(pieces), threads=2, progress=seen.append)
    assert sum(seen) == trace.num_tokens
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(
            getattr(chunked, field.name), getattr(whole, field.name), err_msg=field.name
        )


def test_chunks_may_have_different_widths():
    wide, narrow = random_trace(1, top_k=4), random_trace(2, top_k=2)
    found = count_chunks([narrow, wide, narrow])
    assert_same(found, count(narrow) + count(wide) + count(narrow))
    assert found.top_k == 4


def test_counts_beyond_32_bits_are_moved_into_wider_tables(monkeypatch):
    monkeypatch.setattr(counts, "_MAX_PENDING", 100)
    monkeypatch.setattr(blocks, "_BLOCK_TOKENS", 40)
    trace = random_trace(num_tokens=330, variable_k=True)
    counter = AffinityCounter(trace.num_experts, trace.layer_ids)
    counter.add(trace)
    assert counter._pending <= 100
    assert_same(counter.result(), reference_count(trace))


def test_arrays_that_are_read_only_or_strided_count_the_same():
    trace = random_trace(num_tokens=60)
    every_other = dataclasses.replace(
        trace, experts=trace.experts[::2], request=trace.request[::2],
        position=trace.position[::2], phase=trace.phase[::2],
    )  # fmt: skip
    frozen = trace.experts.copy()
    frozen.flags.writeable = False
    assert_same(count(every_other), reference_count(every_other))
    assert_same(count(dataclasses.replace(trace, experts=frozen)), count(trace))


def test_groups_are_counted_apart_and_add_up():
    rng = np.random.default_rng(5)
    request = rng.integers(0, 6, 80)
    phase = rng.integers(0, 2, 80)
    labels = {0: "code", 1: "chat", 2: "code", 3: "chat", 4: "code"}
    trace = random_trace(num_tokens=80, request=request, phase=phase, labels=labels)
    halves = [trace.select(np.arange(80) < 33), trace.select(np.arange(80) >= 33)]

    by_phase = count_by(halves, phase_of)
    assert list(by_phase) == ["decode", "prefill"]
    assert_same(by_phase["decode"], count(trace.select(phase == 1)))
    assert_same(by_phase["decode"] + by_phase["prefill"], count(trace))

    by_label = count_by(halves, label_of)
    assert list(by_label) == ["", "chat", "code"]
    assert_same(by_label["code"], count(trace.select(np.isin(request, [0, 2, 4]))))
    assert_same(by_label[""], count(trace.select(request == 5)))


@pytest.mark.parametrize("bad", [-2, 6, 32767])
def test_an_id_that_is_no_expert_is_refused(bad):
    experts = random_trace().experts.copy()
    experts[7, 1, 2] = bad
    with pytest.raises(ValueError, match=r"expert ids lie in .*expected -1\.\.5"):
        count(trace_of(experts, 6))


def test_parts_of_different_models_are_refused():
    with pytest.raises(ValueError, match="7 experts to counts of 6"):
        _ = count(random_trace()) + count(random_trace(num_experts=7))
    with pytest.raises(ValueError, match="layers"):
        _ = count(random_trace()) + count(random_trace(num_layers=4))
    with pytest.raises(ValueError, match="7 experts, expected 6"):
        count_chunks([random_trace(), random_trace(num_experts=7)])
    with pytest.raises(ValueError, match="layers"):
        count_chunks([random_trace(), random_trace(num_layers=2)])
    with pytest.raises(ValueError, match="no chunks"):
        count_chunks([])

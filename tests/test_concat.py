"""Several traces as one: nothing is mixed up, and a single one is itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import topic_trace

from placer.errors import UsageError
from placer.trace import MemorySource
from placer.trace.concat import concatenate


@pytest.fixture
def pair():
    first = topic_trace(seed=1, num_requests=4, weights=True)
    second = topic_trace(seed=2, num_requests=3, top_k=2, weights=True)
    return first, second


def test_one_source_is_given_back_as_it_is(pair):
    source = MemorySource(pair[0])
    assert concatenate([source]) is source


@pytest.mark.parametrize("chunk", [7, 1000])
def test_tokens_follow_one_another_with_requests_and_steps_of_their_own(pair, chunk):
    first, second = pair
    joined = concatenate([MemorySource(first), MemorySource(second)])
    chunks = list(joined.chunks(chunk))
    assert all(c.num_tokens <= chunk for c in chunks)
    request = np.concatenate([c.request for c in chunks])
    step = np.concatenate([c.step for c in chunks])
    split = first.num_tokens
    assert joined.num_tokens == request.size == split + second.num_tokens
    assert (request[:split] == first.request).all()
    assert (request[split:] - second.request == request[:split].max() + 1).all()
    assert set(step[:split]) & set(step[split:]) == set()
    experts = np.concatenate([c.experts for c in chunks])
    assert (experts[split:, :, :2] == second.experts).all()
    assert (experts[split:, :, 2:] == -1).all()
    assert joined.top_k == 4


def test_labels_go_with_their_requests(pair):
    first, second = pair
    joined = concatenate([MemorySource(first), MemorySource(second)])
    labels = joined.request_labels()
    assert [labels[i] for i in range(4)] == [first.labels[i] for i in range(4)]
    assert [labels[4 + i] for i in range(3)] == [second.labels[i] for i in range(3)]
    for chunk in joined.chunks(7):
        assert chunk.labels == {i: labels[i] for i in np.unique(chunk.request)}


@pytest.mark.parametrize("column", ["weights", "step"])
def test_a_column_that_one_source_lacks_is_dropped(pair, column):
    first, second = pair
    joined = concatenate([MemorySource(first), MemorySource(replace(second, **{column: None}))])
    assert all(getattr(chunk, column) is None for chunk in joined.chunks(50))
    assert not getattr(joined, f"has_{column}")


def test_reading_it_whole_gives_the_same_tokens(pair):
    joined = concatenate([MemorySource(trace) for trace in pair])
    whole = joined.read()
    assert (whole.request == np.concatenate([c.request for c in joined.chunks(13)])).all()
    assert whole.weights is not None
    columns = list(joined.token_columns(["request", "step"]))
    assert (np.concatenate([c["request"] for c in columns]) == whole.request).all()
    assert (np.concatenate([c["step"] for c in columns]) == whole.step).all()


def test_filters_see_the_shifted_requests(pair):
    joined = concatenate([MemorySource(trace) for trace in pair])
    kept = joined.filtered(requests=[0, 6], phase="decode").read()
    assert set(kept.request) == {0, 6}
    assert kept.num_tokens == 2 * 12


@pytest.mark.parametrize(
    "other",
    [topic_trace(num_layers=5), topic_trace(num_experts=32), topic_trace(layer_ids=range(6))],
    ids=["layers", "experts", "layer ids"],
)
def test_traces_of_two_models_are_refused(pair, other):
    with pytest.raises(UsageError, match=r"layers \(ids .*\) x"):
        concatenate([MemorySource(pair[0]), MemorySource(other)])


def test_dropping_gate_weights_keeps_the_primary_experts(pair):
    weighted = replace(
        pair[0], weights=np.random.default_rng(0).random(pair[0].experts.shape, np.float32)
    )
    plain = replace(pair[1], weights=None)
    joined = concatenate([MemorySource(weighted), MemorySource(plain)]).read()
    assert joined.weights is None
    assert (joined.primary()[: weighted.num_tokens] == weighted.primary()).all()
    assert (np.sort(joined.experts[: weighted.num_tokens]) == np.sort(weighted.experts)).all()

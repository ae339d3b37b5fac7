import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import assert_same, random_trace, traces, unhurried

from placer.errors import BadFileError
from placer.trace import ModelDims, Trace, make_trace

GOOD: dict[str, Any] = {"experts": [[[0, 1]], [[2, -1]], [[3, 0]]], "num_experts": 4}


def test_defaults_are_one_request_in_order_all_prefill() -> None:
    trace = make_trace(**GOOD)
    assert trace.experts.dtype == np.int16
    assert trace.request.tolist() == [0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.phase.tolist() == [0, 0, 0]
    assert trace.layer_ids.tolist() == [0]
    assert (trace.step, trace.weights, trace.home) == (None, None, None)
    assert trace.labels == {}
    assert trace.model == ModelDims()


def test_position_defaults_to_the_index_within_each_request() -> None:
    trace = make_trace(experts=np.zeros((6, 1, 1), int), num_experts=1, request=[7, 3, 7, 7, 3, 5])
    assert trace.position.tolist() == [0, 0, 1, 2, 1, 0]


def test_two_dimensional_experts_are_top_1() -> None:
    trace = make_trace(experts=[[0, 1], [2, -1]], num_experts=3, weights=[[0.5, 1], [1, 9]])
    assert trace.experts.shape == (2, 2, 1)
    assert trace.weights is not None
    assert trace.weights[:, :, 0].tolist() == [[0.5, 1], [1, 0]]


def test_many_experts_are_kept_as_int32() -> None:
    trace = make_trace(experts=[[[40000]]], num_experts=40001)
    assert trace.experts.dtype == np.int32


def test_unused_entries_move_to_the_end_and_weights_move_along() -> None:
    trace = make_trace(
        experts=[[[-1, 5, -1, 2]], [[1, 2, 3, 4]]],
        num_experts=8,
        weights=[[[9, 0.25, 9, 0.75]], [[1, 2, 3, 4]]],
    )
    assert trace.experts.tolist() == [[[5, 2, -1, -1]], [[1, 2, 3, 4]]]
    assert trace.weights is not None
    assert trace.weights.tolist() == [[[0.25, 0.75, 0, 0]], [[1, 2, 3, 4]]]


def test_the_callers_arrays_are_left_as_they_were() -> None:
    experts = np.array([[[-1, 5]]], np.int16)
    weights = np.array([[[7, 1]]], np.float32)
    make_trace(experts=experts, num_experts=8, weights=weights)
    assert experts.tolist() == [[[-1, 5]]]
    assert weights.tolist() == [[[7, 1]]]


def test_arrays_that_are_right_already_are_not_copied() -> None:
    first = random_trace(weights=True, step=True)
    again = make_trace(
        experts=first.experts, num_experts=8, weights=first.weights, request=first.request
    )
    assert np.shares_memory(again.experts, first.experts)
    assert np.shares_memory(again.request, first.request)


def test_nan_weights_of_unused_entries_do_not_matter() -> None:
    trace = make_trace(**GOOD, weights=[[[1, 1]], [[1, np.nan]], [[1, 1]]])
    assert trace.weights is not None
    assert trace.weights[1, 0, 1] == 0


def test_negative_weights_are_legitimate() -> None:
    assert make_trace(**GOOD, weights=[[[-1, 1]]] * 3).weights is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": np.zeros((0, 2, 1), int)}, "no tokens"),
        ({"experts": np.zeros((2, 0, 1), int)}, "no layers"),
        ({"experts": np.zeros((2, 1, 0), int)}, "no experts per token"),
        ({"experts": [0, 1]}, r"shape \(2,\), expected \[tokens, layers, k\]"),
        ({"experts": [[[0.0, 1.0]]]}, "experts holds float64, expected integers"),
        ({"experts": [[["a"]]]}, "experts holds <U1, expected integers"),
        ({"experts": [[[0, 1]], [[4, 0]]]}, r"id 4 at token 1, layer 0, expected -1\.\.3"),
        ({"experts": [[[0, 1]], [[0, -2]]]}, "id -2 at token 1, layer 0"),
        ({"experts": np.array([[[2**63]]], np.uint64)}, "expert id 9223372036854775808"),
        ({"experts": [[[1, 1]]]}, "expert 1 stands twice at token 0, layer 0"),
        ({"experts": [[[0, 1, 2, 3, -1]]]}, "5 experts of a layer that has 4"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 4.0}, "num_experts is 4.0, expected an integer"),
        ({"num_experts": True}, "num_experts is True"),
        ({"layer_ids": [1, 2]}, r"layer_ids is int64 of shape \(2,\), expected 1 integers"),
        ({"layer_ids": [-1]}, "layer_ids starts at -1"),
        ({"request": [0, 1]}, r"request is int64 of shape \(2,\), expected 3 integers"),
        ({"request": [0, 1, -1]}, "request of token 2 is -1"),
        ({"request": np.array([0, 1, 2**63], np.uint64)}, "more than an int64"),
        ({"position": [0.0, 1.0, 2.0]}, "position is float64"),
        ({"phase": [0, 2, 1]}, "phase of token 1 is 2, expected 0"),
        ({"phase": [0, 1]}, r"phase is int64 of shape \(2,\)"),
        ({"step": [0, -5, 1]}, "step of token 1 is -5"),
        ({"home": [0, 0, -1]}, "home of token 2 is -1"),
        ({"weights": [[[1, 1]]]}, r"weights has shape \(1, 1, 2\), expected \(3, 1, 2\)"),
        ({"weights": [[["x", "y"]]] * 3}, "weights holds <U1, expected floats"),
        ({"weights": [[[1, 1]], [[1, 1]], [[1, np.nan]]]}, "expert 0 at token 2, layer 0 is nan"),
        ({"weights": [[[1, np.inf]], [[1, 1]], [[1, 1]]]}, "expert 1 at token 0, layer 0 is inf"),
        ({"weights": [[[1, 1e300]], [[1, 1]], [[1, 1]]]}, "expected a finite float32"),
        ({"labels": {5: "x"}}, "label is given for request 5, which has no tokens"),
        ({"labels": ["a", "b"]}, "2 labels, expected 1"),
        ({"labels": "a"}, "labels is one string"),
        ({"labels": [3]}, "the label of request 0 is 3, expected a string"),
        ({"labels": np.array([b"x"])}, "request_label is |S1"),
    ],
)
def test_what_is_unsound_is_refused_with_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadFileError, match=message) as caught:
        make_trace(**{**GOOD, **changes}, where="mine.npz")
    assert caught.value.message.startswith("mine.npz")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("ids", "pair"), [([0, 2, 1], "1 after 2"), ([0, 5, 1], "1 after 5")])
def test_layer_ids_must_increase(ids: list[int], pair: str) -> None:
    with pytest.raises(BadFileError, match=f"layer_ids has {pair}"):
        make_trace(experts=np.zeros((1, 3, 1), int), num_experts=2, layer_ids=ids)


def test_messages_name_the_real_layer() -> None:
    experts = np.zeros((40_000, 2, 1), int)
    experts[33_333, 1] = 9
    with pytest.raises(BadFileError, match="id 9 at token 33333, layer 12"):
        make_trace(experts=experts, num_experts=4, layer_ids=[3, 12])


@pytest.mark.parametrize("top_k", [2, 8, 40])
def test_a_repeat_is_found_in_any_two_columns(top_k: int) -> None:
    experts = np.tile(np.arange(top_k), (3, 2, 1))
    experts[2, 1, -1] = experts[2, 1, 0]
    with pytest.raises(BadFileError, match="expert 0 stands twice at token 2, layer 1"):
        make_trace(experts=experts, num_experts=top_k)


@pytest.mark.parametrize("top_k", [3, 40])
def test_several_unused_entries_are_no_repeat(top_k: int) -> None:
    experts = np.full((2, 2, top_k), -1)
    experts[..., 0] = 1
    assert make_trace(experts=experts, num_experts=top_k).top_k == top_k


def test_labels_are_indexed_by_request_id_when_as_long_as_the_largest_id_plus_one() -> None:
    trace = make_trace(**GOOD, request=[0, 2, 2], labels=["a", "b", "c"])
    assert trace.labels == {0: "a", 2: "c"}


def test_labels_are_indexed_by_rank_when_as_many_as_requests() -> None:
    trace = make_trace(**GOOD, request=[9, 4, 9], labels=["a", "b"])
    assert trace.labels == {4: "a", 9: "b"}


def test_empty_labels_mean_none() -> None:
    assert make_trace(**GOOD, request=[0, 1, 2], labels=["", None, "x"]).labels == {2: "x"}
    assert make_trace(**GOOD, labels={0: ""}).labels == {}


@unhurried
@given(traces())
def test_a_checked_trace_passes_unchanged(trace: Trace) -> None:
    again = make_trace(
        experts=trace.experts,
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        request=trace.request,
        position=trace.position,
        phase=trace.phase,
        step=trace.step,
        weights=trace.weights,
        home=trace.home,
        labels=trace.labels,
        model=trace.model,
    )
    assert_same(again, trace)


@unhurried
@given(traces(variable=True, weights=True), st.randoms())
def test_where_unused_entries_stand_does_not_matter(trace: Trace, random: Any) -> None:
    """Spreading -1 among the used ids, which keep their order, gives the same trace."""
    num_tokens, num_layers, top_k = trace.experts.shape
    experts = np.full_like(trace.experts, -1)
    weights = np.full(experts.shape, np.nan)
    assert trace.weights is not None
    for token in range(num_tokens):
        for layer in range(num_layers):
            used = int((trace.experts[token, layer] >= 0).sum())
            at = sorted(random.sample(range(top_k), used))
            experts[token, layer, at] = trace.experts[token, layer, :used]
            weights[token, layer, at] = trace.weights[token, layer, :used]
    again = make_trace(experts=experts, num_experts=trace.num_experts, weights=weights)
    np.testing.assert_array_equal(again.experts, trace.experts)
    np.testing.assert_array_equal(again.weights, trace.weights)


def test_every_refusal_says_what_was_expected() -> None:
    with pytest.raises(BadFileError) as caught:
        make_trace(experts=[[[7]]], num_experts=4, where="x")
    assert re.search("expected", caught.value.message)
    assert caught.value.hint

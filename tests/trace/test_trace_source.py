from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import REAL_TRACE, assert_same, python, random_trace, traces, unhurried

from placer.errors import PlacerError, UsageError
from placer.trace import (
    MemorySource,
    Trace,
    TraceSource,
    TraceWriter,
    import_npz,
    make_trace,
    open_trace,
    write_npz,
    write_trace,
)


def every_kind(trace: Trace, folder: Path) -> list[TraceSource]:
    """The same trace in memory, in an .npz file and on disk in one part and in many."""
    write_npz(trace, folder / "a.npz")
    write_trace(trace, folder / "whole")
    with TraceWriter(
        folder / "parts",
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        top_k=trace.top_k,
        model=trace.model,
        weights=trace.weights is not None,
        step=trace.step is not None,
        home=trace.home is not None,
        part_tokens=7,
    ) as writer:
        writer.append_trace(trace)
    return [
        MemorySource(trace),
        open_trace(folder / "a.npz"),
        open_trace(folder / "whole"),
        open_trace(folder / "parts"),
    ]


@unhurried
@given(traces(), st.integers(1, 30))
def test_all_kinds_of_sources_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, max_tokens: int
) -> None:
    for source in every_kind(trace, tmp_path_factory.mktemp("kinds")):
        assert source.num_tokens == trace.num_tokens
        assert source.num_layers == trace.num_layers
        assert source.top_k == trace.top_k
        assert source.model == trace.model
        assert source.has_weights == (trace.weights is not None)
        assert source.has_step == (trace.step is not None)
        assert source.has_home == (trace.home is not None)
        assert source.complete
        assert source.request_ids().tolist() == trace.requests().tolist()
        assert source.request_labels() == trace.labels
        assert_same(source.read(), trace)
        assert source.read(with_weights=False).weights is None
        at = 0
        for chunk in source.chunks(max_tokens):
            assert 1 <= chunk.num_tokens <= max_tokens
            here = slice(at, at + chunk.num_tokens)
            np.testing.assert_array_equal(chunk.experts, trace.experts[here])
            np.testing.assert_array_equal(chunk.request, trace.request[here])
            present = set(chunk.request.tolist())
            assert chunk.labels == {i: x for i, x in trace.labels.items() if i in present}
            at += chunk.num_tokens


@unhurried
@given(traces(labels=True, requests=6), st.data())
def test_filters_agree_with_a_mask_over_the_whole_trace(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, data: st.DataObject
) -> None:
    phase = data.draw(st.sampled_from([None, "prefill", "decode", 0, 1]))
    ids = trace.requests().tolist()
    requests = data.draw(st.none() | st.lists(st.sampled_from(ids), unique=True, max_size=4))
    labels = data.draw(st.none() | st.just(sorted(set(trace.labels.values()))[:1]))
    if labels == []:
        labels = None
    mask = np.ones(trace.num_tokens, bool)
    if phase is not None:
        mask &= trace.phase == (1 if phase in ("decode", 1) else 0)
    if requests is not None:
        mask &= np.isin(trace.request, requests)
    if labels is not None:
        mask &= np.isin(trace.request, [i for i, x in trace.labels.items() if x in labels])
    for source in every_kind(trace, tmp_path_factory.mktemp("kinds")):
        if not mask.any():
            with pytest.raises(PlacerError, match="has no tokens"):
                source.filtered(phase=phase, requests=requests, labels=labels)
            continue
        found = source.filtered(phase=phase, requests=requests, labels=labels)
        expected = trace.select(mask)
        present = set(expected.requests().tolist())
        assert found.num_tokens == mask.sum()
        assert found.request_ids().tolist() == sorted(present)
        assert found.request_labels() == {i: x for i, x in trace.labels.items() if i in present}
        whole = found.read()
        np.testing.assert_array_equal(whole.experts, expected.experts)
        np.testing.assert_array_equal(whole.position, expected.position)
        assert whole.labels == found.request_labels()


@unhurried
@given(traces(), st.integers(1, 30))
def test_a_fingerprint_does_not_depend_on_the_file(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, max_tokens: int
) -> None:
    assert (
        len({source.fingerprint() for source in every_kind(trace, tmp_path_factory.mktemp("f"))})
        == 1
    )


def test_an_imported_file_has_the_fingerprint_of_its_original(tmp_path: Path) -> None:
    write_npz(random_trace(variable=True), tmp_path / "a.npz")
    import_npz(tmp_path / "a.npz", tmp_path / "a")
    assert open_trace(tmp_path / "a").fingerprint() == open_trace(tmp_path / "a.npz").fingerprint()


def test_a_fingerprint_does_not_depend_on_padding() -> None:
    narrow = make_trace(experts=[[[0, 1]], [[2, -1]]], num_experts=4)
    wide = make_trace(experts=[[[0, 1, -1]], [[-1, 2, -1]]], num_experts=4)
    assert MemorySource(narrow).fingerprint() == MemorySource(wide).fingerprint()


def test_a_fingerprint_changes_with_all_that_counts() -> None:
    def of(**changes: object) -> str:
        arrays = {
            "experts": [[[0, 1]], [[2, -1]], [[3, -1]]],
            "num_experts": 4,
            "layer_ids": [1],
            "request": [0, 0, 1],
            "position": [0, 1, 0],
            "phase": [0, 0, 1],
            **changes,
        }
        return MemorySource(make_trace(**arrays)).fingerprint()  # type: ignore[arg-type]

    different = [
        of(),
        of(experts=[[[0, 1]], [[2, -1]], [[2, -1]]]),
        of(experts=[[[0, -1]], [[1, 2]], [[3, -1]]]),
        of(experts=[[[1, 0]], [[2, -1]], [[3, -1]]]),
        of(num_experts=5),
        of(layer_ids=[2]),
        of(request=[0, 1, 1]),
        of(position=[0, 1, 2]),
        of(phase=[0, 1, 1]),
    ]
    assert len(set(different)) == len(different)
    assert of(weights=[[[1, 1]]] * 3, step=[0, 0, 0], labels=["a", "b"]) == of()


def test_a_fingerprint_is_the_same_in_every_release() -> None:
    trace = make_trace(experts=[[[0, 1], [1, -1]], [[2, 0], [3, 1]]], num_experts=4)
    assert MemorySource(trace).fingerprint() == (
        "2c402a6d42f8f2ed97d5582525bc05e50b6eb773ad5ba6e2d2c6a9480d4f2f4a"
    )


def test_requests_by_phase_and_label() -> None:
    trace = make_trace(
        experts=np.zeros((4, 1, 1), int),
        num_experts=1,
        request=[5, 7, 7, 9],
        phase=[0, 0, 1, 1],
        labels={5: "code", 7: "code", 9: "maths"},
    )
    source = MemorySource(trace)
    assert source.requests(phase="prefill").tolist() == [5, 7]
    assert source.requests(phase=1).tolist() == [7, 9]
    assert source.requests(labels=["code"]).tolist() == [5, 7]
    assert source.requests(phase="decode", labels=["code"]).tolist() == [7]
    assert source.requests(labels=["none such"]).tolist() == []


def test_an_empty_phase_says_which_phases_there_are() -> None:
    source = MemorySource(make_trace(experts=np.zeros((3, 1, 1), int), num_experts=1))
    with pytest.raises(PlacerError, match="has no tokens of phase decode") as caught:
        source.filtered(phase="decode")
    assert "3 prefill" in caught.value.hint
    assert caught.value.exit_code == 2


def test_an_unknown_label_says_which_labels_there_are() -> None:
    source = MemorySource(random_trace(labels=True, requests=20, tokens=200))
    with pytest.raises(
        PlacerError, match="no request of the trace has the label 'poetry'"
    ) as caught:
        source.filtered(labels=["code", "poetry"])
    assert caught.value.hint == "labels: Prosa ü, code, maths"
    with pytest.raises(PlacerError) as caught:
        MemorySource(random_trace()).filtered(labels="code")
    assert caught.value.hint == "labels: none"


def test_unknown_requests_say_which_there_are() -> None:
    source = MemorySource(make_trace(experts=[[0], [0]], num_experts=1, request=[3, 4]))
    with pytest.raises(PlacerError, match="request") as caught:
        source.filtered(requests=[99])
    assert "requests: 3, 4" in caught.value.hint
    with pytest.raises(PlacerError):
        source.filtered(requests=[])


def test_an_unknown_phase_is_a_usage_error() -> None:
    for phase in ("both", 2, -1):
        with pytest.raises(UsageError, match="no phase"):
            MemorySource(random_trace()).filtered(phase=phase)


def test_filters_can_be_stacked() -> None:
    trace = random_trace(tokens=300, labels=True)
    source = MemorySource(trace).filtered(phase="decode")
    wanted = source.request_ids()[:2]
    found = source.filtered(requests=wanted).read()
    assert set(found.phase.tolist()) == {1}
    assert found.requests().tolist() == wanted.tolist()


def test_no_filter_is_the_source_itself() -> None:
    source = MemorySource(random_trace())
    assert source.filtered() is source


def test_a_chunk_holds_at_least_one_token() -> None:
    with pytest.raises(UsageError, match="max_tokens is 0"):
        next(MemorySource(random_trace()).chunks(0))


def test_chunks_can_be_gone_through_again_and_left_early(tmp_path: Path) -> None:
    write_trace(random_trace(), tmp_path / "t")
    source = open_trace(tmp_path / "t")
    for _ in source.chunks(5):
        break
    assert sum(chunk.num_tokens for chunk in source.chunks(5)) == 50


def test_arrays_read_from_disk_may_be_written_to(tmp_path: Path) -> None:
    write_trace(random_trace(weights=True, step=True, home=True), tmp_path / "t")
    for chunk in open_trace(tmp_path / "t").chunks():
        for name in ("experts", "request", "position", "phase", "step", "weights", "home"):
            assert getattr(chunk, name).flags.writeable
            assert getattr(chunk, name).flags.c_contiguous


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    write_trace(random_trace(), tmp_path / "t")
    assert open_trace(str(tmp_path / "t")).num_tokens == 50


def test_importing_traces_loads_numpy_but_neither_pyarrow_nor_pydantic() -> None:
    process = python(
        "import placer.trace, sys; print(sorted({'pyarrow', 'pydantic'} & {*sys.modules}))"
    )
    assert process.communicate()[0] == "[]\n"


@pytest.mark.skipif(not REAL_TRACE.exists(), reason="the shared trace is not here")
def test_a_real_trace_survives_the_import(tmp_path: Path) -> None:
    import_npz(REAL_TRACE, tmp_path / "t")
    original, copy = open_trace(REAL_TRACE), open_trace(tmp_path / "t")
    assert_same(copy.read(), original.read())
    assert copy.fingerprint() == original.fingerprint()
    assert copy.filtered(labels="Chemistry (general)").request_ids().size > 0

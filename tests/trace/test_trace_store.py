import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import assert_same, python, random_trace, traces, unhurried

from placer.errors import BadFileError, PlacerError, UsageError
from placer.trace import ModelDims, Trace, TraceWriter, open_trace, write_trace

SMALL: dict[str, Any] = {"num_experts": 8, "layer_ids": [0, 1], "top_k": 2, "step": False}


def writer_for(trace: Trace, path: Path, **changes: Any) -> TraceWriter:
    """A writer that records all that `trace` has."""
    settings: dict[str, Any] = {
        "num_experts": trace.num_experts,
        "layer_ids": trace.layer_ids,
        "top_k": trace.top_k,
        "model": trace.model,
        "weights": trace.weights is not None,
        "step": trace.step is not None,
        "home": trace.home is not None,
    }
    return TraceWriter(path, **{**settings, **changes})


def tokens(first: int, count: int) -> dict[str, Any]:
    """`count` tokens of SMALL, recognisable by their positions."""
    position = np.arange(first, first + count)
    experts = np.stack([position % 8, (position + 1) % 8], axis=1)[:, None, :].repeat(2, axis=1)
    return {
        "experts": experts,
        "request": position // 10,
        "position": position,
        "phase": np.zeros(count, int),
    }


def pieces(trace: Trace, cuts: list[int]) -> Iterator[Trace]:
    for start, stop in zip([0, *cuts], [*cuts, trace.num_tokens], strict=True):
        mask = np.zeros(trace.num_tokens, bool)
        mask[start:stop] = True
        yield trace.select(mask)


@unhurried
@given(traces(), st.integers(1, 40), st.lists(st.integers(0, 60), max_size=5), st.integers(1, 99))
def test_what_is_appended_in_any_pieces_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    trace: Trace,
    part_tokens: int,
    cuts: list[int],
    max_tokens: int,
) -> None:
    path = tmp_path_factory.mktemp("native") / "trace"
    with writer_for(trace, path, part_tokens=part_tokens) as writer:
        for piece in pieces(trace, sorted(min(cut, trace.num_tokens) for cut in cuts)):
            writer.append_trace(piece)
    source = open_trace(path)
    assert_same(source.read(), trace)
    assert (source.complete, source.warnings) == (True, [])
    chunks = list(source.chunks(max_tokens))
    assert sum(chunk.num_tokens for chunk in chunks) == source.num_tokens == trace.num_tokens
    assert all(1 <= chunk.num_tokens <= max_tokens for chunk in chunks)


@unhurried
@given(traces(), st.integers(1, 3), st.integers(1, 20))
def test_streams_of_several_ranks_are_read_in_the_order_of_the_ranks(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, num_ranks: int, part_tokens: int
) -> None:
    path = tmp_path_factory.mktemp("native") / "trace"
    owner = np.arange(trace.num_tokens) % num_ranks
    writers = [
        writer_for(trace, path, rank=rank, part_tokens=part_tokens) for rank in range(num_ranks)
    ]
    for rank in reversed(range(num_ranks)):
        writers[rank].append_trace(trace.select(owner == rank))
        writers[rank].close()
    expected = np.concatenate([np.flatnonzero(owner == rank) for rank in range(num_ranks)])
    found = open_trace(path).read()
    np.testing.assert_array_equal(found.experts, trace.experts[expected])
    np.testing.assert_array_equal(found.request, trace.request[expected])
    assert found.labels == trace.labels


def test_the_callers_buffers_may_be_reused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **SMALL) as writer:
        batch = tokens(0, 4)
        writer.append(**batch)
        batch["experts"][...] = 7
        batch["position"][...] = 99
    assert open_trace(tmp_path / "t").read().position.tolist() == [0, 1, 2, 3]


def test_fewer_experts_than_top_k_may_be_appended(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **{**SMALL, "top_k": 4}) as writer:
        writer.append(**tokens(0, 3))
        wide = tokens(3, 1) | {"experts": [[[1, 2, 3, -1, 4, -1]] * 2]}
        writer.append(**wide)
    found = open_trace(tmp_path / "t").read().experts
    assert found[0, 0].tolist() == [0, 1, -1, -1]
    assert found[3, 0].tolist() == [1, 2, 3, 4]


def test_a_full_buffer_becomes_a_part_at_once(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **SMALL, part_tokens=10) as writer:
        writer.append(**tokens(0, 25))
        assert sorted(path.name for path in (tmp_path / "t").glob("part-*")) == [
            "part-0-00000.parquet",
            "part-0-00001.parquet",
        ]
        assert open_trace(tmp_path / "t").num_tokens == 20
    assert open_trace(tmp_path / "t").num_tokens == 25


def test_an_exception_in_the_block_keeps_the_tokens_but_not_the_mark(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with TraceWriter(tmp_path / "t", **SMALL) as writer:
            writer.append(**tokens(0, 7))
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    source = open_trace(tmp_path / "t")
    assert source.num_tokens == 7
    assert not source.complete
    assert source.warnings == [
        "rank 0 is unfinished (still writing, or cut off): 7 of its tokens are there"
    ]


def test_a_refused_append_changes_nothing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **SMALL) as writer:
        writer.append(**tokens(0, 5))
        with pytest.raises(BadFileError, match="id 8 at token 6, layer 1"):
            writer.append(**tokens(5, 2) | {"experts": [[[0, 1]] * 2, [[0, 1], [8, 1]]]})
        with pytest.raises(BadFileError, match="phase of token 5 is 3"):
            writer.append(**tokens(5, 2) | {"phase": [3, 0]})
        writer.append(**tokens(5, 1))
    assert open_trace(tmp_path / "t").read().position.tolist() == [0, 1, 2, 3, 4, 5]


def test_appends_that_do_not_fit_the_trace_are_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **SMALL) as writer:
        writer.append(**tokens(0, 0))
        with pytest.raises(BadFileError, match="3 layers, expected 2"):
            writer.append(**tokens(0, 1) | {"experts": [[[0, 1]] * 3]})
        with pytest.raises(BadFileError, match="token 0 uses more than 2 experts in layer 1"):
            writer.append(**tokens(0, 1) | {"experts": [[[0, 1, -1], [0, 1, 2]]]})
        with pytest.raises(UsageError, match="does not record weights"):
            writer.append(**tokens(0, 1), weights=np.ones((1, 2, 2)))
        with pytest.raises(UsageError, match="about 8 experts in layers"):
            writer.append_trace(random_trace(layers=3))
        with pytest.raises(BadFileError, match="1 labels for 2 tokens"):
            writer.append(**tokens(0, 2), labels=["a"])
        with pytest.raises(BadFileError, match="label of request 0 is 5"):
            writer.append(**tokens(0, 1), labels=[5])  # type: ignore[list-item]
        writer.append(**tokens(0, 1), labels=["a"])
        with pytest.raises(BadFileError, match="request 0 is labelled both 'a' and 'b'"):
            writer.append(**tokens(1, 1), labels=["b"])
    with pytest.raises(UsageError, match="is closed"):
        writer.append(**tokens(0, 1))
    assert open_trace(tmp_path / "t").num_tokens == 1


def test_what_the_writer_records_must_be_given(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="records step, but append was called without it"),
        TraceWriter(tmp_path / "t", **{**SMALL, "step": True}) as writer,
    ):
        writer.append(**tokens(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_ids": []}, "layer_ids"),
        ({"layer_ids": [3, 2]}, "expected increasing"),
        ({"layer_ids": [-1, 3]}, "layer_ids"),
        ({"num_experts": 0}, "num_experts"),
        ({"top_k": 9}, "top_k is 9, more than the 8 experts"),
        ({"rank": -1}, "rank is -1"),
        ({"part_tokens": 0}, "part_tokens is 0"),
        ({"model": ModelDims(hidden_size=-1)}, "hidden_size"),
        ({"source": {"when": object()}}, "source"),
    ],
)
def test_senseless_settings_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TraceWriter(tmp_path / "t", **{**SMALL, **changes})
    assert not (tmp_path / "t").exists()


def test_a_trace_that_is_there_is_refused_without_force(tmp_path: Path) -> None:
    write_trace(random_trace(tokens=9), tmp_path / "t")
    with pytest.raises(UsageError, match="holds a trace already"):
        write_trace(random_trace(), tmp_path / "t")
    assert open_trace(tmp_path / "t").num_tokens == 9


def test_force_replaces_the_trace_and_leaves_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    with TraceWriter(folder, **SMALL, part_tokens=4) as writer:
        writer.append(**tokens(0, 20))
    TraceWriter(folder, **SMALL, rank=3).close()
    for name in (".part-0-00007.parquet.tmp", ".closed-1.json.x1.json", "notes.txt", "part-a.csv"):
        (folder / name).write_text("x")
    write_trace(random_trace(tokens=6), folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "closed-0.json",
        "manifest.json",
        "notes.txt",
        "part-0-00000.parquet",
        "part-a.csv",
    ]
    assert open_trace(folder).num_tokens == 6


def test_a_folder_of_other_files_is_not_written_into_without_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds other files, but no trace"):
        TraceWriter(tmp_path, **SMALL)
    TraceWriter(tmp_path, **SMALL, force=True).close()
    assert (tmp_path / "thesis.tex").exists()


def test_another_programs_manifest_is_never_replaced(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"name": "a web page"}')
    with pytest.raises(BadFileError, match=r"is not a placer\.trace file"):
        TraceWriter(tmp_path, **SMALL, force=True)
    assert manifest.read_text() == '{"name": "a web page"}'


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, **SMALL) as writer:
        writer.append(**tokens(0, 1))
    assert open_trace(tmp_path / "manifest.json").num_tokens == 1


def test_a_file_or_a_missing_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        TraceWriter(tmp_path / "file", **SMALL)
    with pytest.raises(UsageError, match="does not exist"):
        TraceWriter(tmp_path / "no" / "t", **SMALL)


def test_only_rank_0_may_force(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank 1 may not replace"):
        TraceWriter(tmp_path / "t", **SMALL, rank=1, force=True)


def test_two_writers_cannot_have_the_same_rank(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **SMALL, rank=1) as writer:
        with pytest.raises(UsageError, match="rank 1"):
            TraceWriter(tmp_path / "t", **SMALL, rank=1)
        writer.append(**tokens(0, 3))
    assert open_trace(tmp_path / "t").complete


def test_ranks_that_describe_different_traces_are_refused(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "t", **SMALL, source={"host": "a"}).close()
    TraceWriter(tmp_path / "t", **SMALL, rank=1, source={"host": "b"}).close()
    with pytest.raises(UsageError, match="another trace: num_experts, top_k"):
        TraceWriter(tmp_path / "t", **{**SMALL, "num_experts": 9, "top_k": 1}, rank=2)
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["source"] == {"host": "a"}


def test_file_systems_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("placer.trace.layout.os.link", refuse)
    for rank in range(2):
        with TraceWriter(tmp_path / "t", **SMALL, rank=rank) as writer:
            writer.append(**tokens(0, 3))
    assert open_trace(tmp_path / "t").num_tokens == 6
    with pytest.raises(UsageError, match="another trace: top_k"):
        TraceWriter(tmp_path / "t", **{**SMALL, "top_k": 1}, rank=2)


def test_a_folder_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("placer.trace.layout.Path.write_text", refuse)
    with pytest.raises(PlacerError, match=r"cannot be written: .*Permission denied"):
        TraceWriter(tmp_path / "t", **SMALL)


def test_a_rank_that_wrote_nothing_yet_leaves_the_trace_unfinished(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", **SMALL) as writer:
        writer.append(**tokens(0, 3))
    late = TraceWriter(tmp_path / "t", **SMALL, rank=1)
    assert not open_trace(tmp_path / "t").complete
    late.close()
    assert open_trace(tmp_path / "t").complete


def test_a_part_that_cannot_be_written_is_reported_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TraceWriter(tmp_path / "t", **SMALL)
    writer.append(**tokens(0, 3))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("placer.trace.store.os.replace", fail)
        with pytest.raises(PlacerError, match="No space left") as caught:
            writer.flush()
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "t").glob("*part*"))
    writer.append(**tokens(3, 1))
    writer.close()
    assert open_trace(tmp_path / "t").num_tokens == 4


_ENDLESS = """
import sys
from pathlib import Path
from test_trace_store import SMALL, tokens
from placer.trace import TraceWriter

writer = TraceWriter(Path(sys.argv[1]), **SMALL, part_tokens=50)
first = 0
while True:
    writer.append(**tokens(first, 7))
    first += 7
    print(writer.num_parts, flush=True)
"""


def test_a_killed_process_loses_at_most_the_part_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "t"
    process = python(_ENDLESS, path)
    assert process.stdout is not None
    with process.stdout:
        reported = 0
        while reported < 3:
            reported = int(process.stdout.readline())
        process.kill()
        process.wait()
    source = open_trace(path)
    assert not source.complete
    assert "rank 0 is unfinished" in source.warnings[0]
    trace = source.read()
    assert trace.num_tokens >= 3 * 50
    assert trace.num_tokens % 50 == 0
    assert trace.position.tolist() == list(range(trace.num_tokens))


_ONE_OF_MANY = """
import sys
from pathlib import Path
from test_trace_store import SMALL, tokens
from placer.trace import TraceWriter

rank = int(sys.argv[2])
with TraceWriter(Path(sys.argv[1]), **SMALL, part_tokens=64, rank=rank) as writer:
    print("open", flush=True)
    sys.stdin.readline()  # until all of them are open
    for first in range(0, 1000, 10):
        writer.append(**tokens(10_000 * rank + first, 10))
"""


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "t"
    processes = [python(_ONE_OF_MANY, path, rank, stdin=subprocess.PIPE) for rank in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in processes:
        process.communicate("go\n")
        assert process.returncode == 0
    source = open_trace(path)
    assert source.complete
    assert source.read().position.tolist() == [*range(1000), *range(10_000, 11_000)]
    assert not [file.name for file in path.iterdir() if file.name.startswith((".", "open"))]


def test_parts_are_plain_parquet(tmp_path: Path) -> None:
    """Read with pyarrow alone: names, types, and values."""
    trace = random_trace(variable=True, weights=True, labels=True, step=True)
    write_trace(trace, tmp_path / "t")
    table = pq.read_table(tmp_path / "t" / "part-0-00000.parquet")
    first, *_ = trace.layer_ids.tolist()
    assert table.column_names[:5] == ["request", "position", "phase", "step", "label"]
    assert table.schema.field("label").type == pa.dictionary(pa.int32(), pa.string())
    assert table.schema.field(f"experts_{first}").type.value_type == pa.int16()
    assert table.schema.field(f"weights_{first}").type.value_type == pa.float32()
    assert table["request"].to_pylist() == trace.request.tolist()
    assert table["label"].to_pylist() == [
        trace.labels.get(request) for request in trace.request.tolist()
    ]
    lists = table[f"experts_{first}"].to_pylist()
    assert lists == [[i for i in row if i >= 0] for row in trace.experts[:, 0].tolist()]


def test_parts_read_as_one_dataset(tmp_path: Path) -> None:
    dataset = pytest.importorskip("pyarrow.dataset")
    for rank in range(2):
        with TraceWriter(tmp_path / "t", **SMALL, rank=rank, part_tokens=4) as writer:
            writer.append(**tokens(0, 9))
    found = dataset.dataset(
        [str(path) for path in sorted((tmp_path / "t").glob("*.parquet"))], format="parquet"
    )
    assert found.count_rows() == 18


def test_parts_are_read_by_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    trace = random_trace(labels=True)
    write_trace(trace, tmp_path / "t")
    frame = pandas.read_parquet(tmp_path / "t" / "part-0-00000.parquet")
    assert frame["position"].tolist() == trace.position.tolist()
    assert frame[f"experts_{trace.layer_ids[0]}"][0].tolist() == trace.experts[0, 0].tolist()

"""Every way in which a native trace can be broken ends in one sentence that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trace_cases import assert_same, random_trace

from placer.errors import BadFileError
from placer.trace import TraceWriter, open_trace

PART = "part-0-00001.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three parts of one rank, 40 + 40 + 20 tokens."""
    trace = random_trace(tokens=100, weights=True, labels=True)
    path = tmp_path / "trace"
    with TraceWriter(
        path,
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        top_k=trace.top_k,
        weights=True,
        step=False,
        part_tokens=40,
    ) as writer:
        writer.append_trace(trace)
    return path


def refused(folder: Path, *mentions: str) -> None:
    """Reading the trace ends in a BadFileError of one line that mentions all of these."""
    with pytest.raises(BadFileError) as caught:
        open_trace(folder).read()
    assert caught.value.exit_code == 5
    assert "\n" not in caught.value.message
    for mention in mentions:
        assert mention in caught.value.message


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "-"}))


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a part anew, as another program would."""
    table = pq.read_table(folder / PART)
    pq.write_table(change(table), folder / PART)


def replace_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def experts_name(table: pa.Table) -> str:
    return next(name for name in table.column_names if name.startswith("experts_"))


def test_the_trace_is_sound_before_it_is_broken(folder: Path) -> None:
    assert open_trace(folder).read().num_tokens == 100


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_a_part_cut_short(folder: Path, share: float) -> None:
    whole = (folder / PART).read_bytes()
    (folder / PART).write_bytes(whole[: int(len(whole) * share)])
    refused(folder, PART, "not a readable Parquet file")


def test_a_foreign_file_under_the_name_of_a_part(folder: Path) -> None:
    (folder / PART).write_bytes(b"I am a poem\n" * 100)
    refused(folder, PART)


def test_a_folder_under_the_name_of_a_part(folder: Path) -> None:
    (folder / PART).unlink()
    (folder / PART).mkdir()
    refused(folder, PART)


def test_no_flipped_bit_changes_what_is_read_unnoticed(folder: Path) -> None:
    """Page checksums are there, and are verified; what they leave out is harmless."""
    whole = (folder / PART).read_bytes()
    expected = open_trace(folder).read()
    noticed = 0
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole), 300, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        (folder / PART).write_bytes(damaged)
        try:
            found = open_trace(folder).read()
        except BadFileError as error:
            assert PART in error.message  # noqa: PT017 (either outcome is right)
            noticed += 1
        else:
            assert_same(found, expected)
    assert noticed > 100


def test_a_missing_part(folder: Path) -> None:
    (folder / PART).unlink()
    refused(folder, PART, "is missing")


def test_a_missing_last_part(folder: Path) -> None:
    (folder / "part-0-00002.parquet").unlink()
    refused(folder, "part-0-00002.parquet is missing")


def test_a_missing_part_of_an_unfinished_stream(folder: Path) -> None:
    (folder / "closed-0.json").unlink()
    assert open_trace(folder).num_tokens == 100
    (folder / PART).unlink()
    refused(folder, f"{PART} is missing")


def test_all_parts_missing(folder: Path) -> None:
    for path in folder.glob("part-*"):
        path.unlink()
    refused(folder, "part-0-00000.parquet is missing")


def test_an_extra_part(folder: Path) -> None:
    shutil.copy(folder / PART, folder / "part-0-00003.parquet")
    refused(folder, "part-0-00003.parquet is too many", "wrote 3 parts")


def test_two_files_for_one_part(folder: Path) -> None:
    shutil.copy(folder / PART, folder / "part-0-1.parquet")
    refused(folder, "part-0-1.parquet", PART)


def test_a_part_replaced_by_a_shorter_one(folder: Path) -> None:
    shutil.copy(folder / "part-0-00002.parquet", folder / PART)
    refused(folder, "80 tokens", "expected 100", "closed-0.json")


def test_a_closed_mark_that_says_nothing(folder: Path) -> None:
    for text in ("", "{", "[]", '{"format": "placer.trace.closed", "schema_version": 1}'):
        (folder / "closed-0.json").write_text(text)
        refused(folder, "closed-0.json")


def test_no_tokens_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, num_experts=2, layer_ids=[0], top_k=1)
    refused(path, "holds no tokens")
    writer.close()
    refused(path, "holds no tokens")


def test_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    refused(folder, "holds no manifest.json")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path / "nowhere" / "manifest.json", "does not exist")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("x")
    refused(tmp_path / "trace.txt", "trace.txt")


def test_a_part_given_instead_of_its_folder(folder: Path) -> None:
    with pytest.raises(BadFileError) as caught:
        open_trace(folder / PART)
    assert str(folder) in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", '"text"', "[1]", '{"format": "placer.plan"}'])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    refused(folder, "manifest.json")


def test_a_newer_version_is_refused_with_the_found_and_the_expected(folder: Path) -> None:
    change_manifest(folder, schema_version=2)
    refused(folder, "schema_version 2", "up to 1")


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": "8"}, "num_experts"),
        ({"num_experts": "-"}, "num_experts"),
        ({"layer_ids": []}, "layer_ids"),
        ({"layer_ids": [4, 3]}, "layer_ids"),
        ({"top_k": 9}, "top_k"),
        ({"weights": 1}, "weights"),
        ({"model": {"hidden_size": -4}}, "hidden_size"),
        ({"schema_version": "1"}, "schema_version"),
    ],
)
def test_a_manifest_that_makes_no_sense(
    folder: Path, changes: dict[str, Any], mention: str
) -> None:
    change_manifest(folder, **changes)
    refused(folder, "manifest.json", mention)


def test_unknown_keys_of_a_manifest_are_ignored(folder: Path) -> None:
    change_manifest(folder, colour="green")
    assert open_trace(folder).num_tokens == 100


def test_a_manifest_of_other_layers(folder: Path) -> None:
    change_manifest(folder, layer_ids=[50, 51, 52])
    refused(folder, "part-0-00000.parquet", "no column experts_50")


def test_a_manifest_that_promises_steps(folder: Path) -> None:
    change_manifest(folder, step=True)
    refused(folder, "no column step")


def test_a_manifest_of_fewer_experts(folder: Path) -> None:
    change_manifest(folder, num_experts=4)
    refused(folder, "part-0-00000.parquet", "expected -1..3")


def test_a_manifest_of_a_smaller_top_k(folder: Path) -> None:
    change_manifest(folder, top_k=1)
    refused(folder, "part-0-00000.parquet", "list of 2, more than the manifest's top_k 1")


def test_a_part_with_columns_of_other_types(folder: Path) -> None:
    rewrite(folder, lambda table: replace_column(table, "phase", table["phase"].cast(pa.int64())))
    refused(folder, PART, "phase is int64, expected uint8")


@pytest.mark.parametrize(
    ("row", "mention"),
    [
        ([9, 1], "expert id 9 at token 3"),
        ([-1, 1], None),  # an unused entry inside a list reads as unused
        ([-2, 1], "expert id -2 at token 3"),
        ([1, 1], "expert 1 stands twice at token 3"),
        ([1, 2, 3], "list of 3"),
        ([1], "lists of other lengths than the experts"),
        (None, "null"),
        ([None, 1], "null"),
    ],
)
def test_a_part_with_an_impossible_row(
    folder: Path, row: list[int | None] | None, mention: str | None
) -> None:
    def change(table: pa.Table) -> pa.Table:
        name = experts_name(table)
        rows = table[name].to_pylist()
        rows[3] = row
        return replace_column(table, name, pa.array(rows, pa.list_(pa.int16())))

    rewrite(folder, change)
    if mention is None:
        assert open_trace(folder).read().num_tokens == 100
    else:
        refused(folder, PART, mention)


@pytest.mark.parametrize(
    ("name", "value", "mention"),
    [
        ("request", -1, "request of token 2 is -1"),
        ("request", None, "request holds 1 null"),
        ("position", -7, "position of token 2 is -7"),
        ("phase", 2, "phase of token 2 is 2"),
    ],
)
def test_a_part_with_an_impossible_value(
    folder: Path, name: str, value: int | None, mention: str
) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[2] = value
        return replace_column(table, name, pa.array(values, table.schema.field(name).type))

    rewrite(folder, change)
    refused(folder, PART, mention)


def test_a_part_with_a_weight_that_is_no_number(folder: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        name = experts_name(table).replace("experts", "weights")
        rows = table[name].to_pylist()
        rows[1][0] = float("nan")
        return replace_column(table, name, pa.array(rows, pa.list_(pa.float32())))

    rewrite(folder, change)
    refused(folder, PART, "at token 1", "nan")
    assert open_trace(folder).read(with_weights=False).num_tokens == 100


def test_a_request_with_two_labels(folder: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        labels = pa.array(["another"] * len(table)).dictionary_encode()
        return replace_column(table, "label", labels.cast(table.schema.field("label").type))

    rewrite(folder, change)
    refused(folder, "is labelled both", "another")


def test_parts_of_two_traces_in_one_folder(folder: Path, tmp_path: Path) -> None:
    other = random_trace(layers=2, num_experts=40_000, top_k=1, tokens=3)
    with TraceWriter(
        tmp_path / "other", num_experts=40_000, layer_ids=other.layer_ids, top_k=1, step=False
    ) as writer:
        writer.append_trace(other)
    shutil.copy(tmp_path / "other" / "part-0-00000.parquet", folder / PART)
    refused(folder, PART)


def test_files_of_other_programs_in_the_folder_are_ignored(folder: Path) -> None:
    for name in (
        "_SUCCESS",
        ".DS_Store",
        "part-0.parquet",
        "notes.md",
        ".part-0-00003.parquet.tmp",
    ):
        (folder / name).write_text("x")
    source = open_trace(folder)
    assert source.complete
    assert source.read().num_tokens == 100


def test_messages_do_not_depend_on_the_size_of_chunks(folder: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table["position"].to_numpy().copy()
        values[33] = -1
        return replace_column(table, "position", pa.array(values))

    rewrite(folder, change)
    for max_tokens in (7, 1000):
        with pytest.raises(BadFileError, match="position of token 33 is -1"):
            for _ in open_trace(folder).chunks(max_tokens):
                pass


def test_a_trace_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("placer.trace.layout.Path.iterdir", refuse)
    refused(folder, str(folder), "cannot be read", "Permission denied")

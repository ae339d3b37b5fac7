"""Files are written whole or not at all, and read only when they are what they claim to be."""

from __future__ import annotations

import json

import pytest

from placer.errors import BadFileError, PlacerError, UsageError
from placer.files import atomic_path, check_output_file, read_json, refuse_overwrite, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_raises_leaves_no_trace_and_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_path(path, force=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(tmp_path) == ["plan.json"]
    assert path.read_text() == "old"


def test_the_temporary_file_lies_in_the_same_folder_and_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a.graphml") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".graphml"
        assert not (tmp_path / "a.graphml").exists()
    assert names(tmp_path) == ["a.graphml"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    with pytest.raises(UsageError, match="exists already"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2}, force=True)
    assert json.loads(path.read_text()) == {"a": 2}


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


def test_a_document_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_no_output_file(tmp_path, force):
    with pytest.raises(UsageError, match="is a folder"):
        check_output_file(tmp_path, force)
    with pytest.raises(UsageError, match="is a folder"), atomic_path(tmp_path, force=force):
        pass


def test_a_missing_folder_is_named_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match="does not exist") as caught:
        check_output_file(tmp_path / "none" / "plan.json", False)
    assert "mkdir -p" in caught.value.hint


def test_what_the_file_system_refuses_is_an_error_of_placer(tmp_path):
    with (
        pytest.raises(PlacerError, match=r"a cannot be written: No space left"),
        atomic_path(tmp_path / "a"),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_refuse_overwrite_is_for_folders_too(tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        refuse_overwrite(tmp_path, False)
    refuse_overwrite(tmp_path, True)


def test_a_file_is_read_back(tmp_path):
    path = tmp_path / "a.json"
    document = {"format": "placer.plan", "schema_version": 2, "x": [1.5, None]}
    write_json(path, document)
    assert read_json(path, "placer.plan", 2) == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "placer.plan", "schema_ver', "not valid JSON"),
        ("", "not valid JSON"),
        ('{"format": "placer.pl', "starting at: line 1 column"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": "placer.plan", "schema_version": 1, "x": NaN}', "NaN"),
        ('{"format": "placer.plan", "schema_version": 1, "x": -Infinity}', "Infinity"),
        ("[1, 2]", "not a placer.plan file"),
        ('{"format": "placer.trace", "schema_version": 1}', "placer.trace"),
        ('{"schema_version": 1}', "None"),
        ('{"format": "placer.plan"}', "schema_version None"),
        ('{"format": "placer.plan", "schema_version": "1"}', "schema_version '1'"),
        ('{"format": "placer.plan", "schema_version": true}', "schema_version True"),
        ('{"format": "placer.plan", "schema_version": 0}', "schema_version 0"),
        ('{"format": "placer.plan", "schema_version": 2}', "schema_version 2.* up to 1"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadFileError, match=message) as caught:
        read_json(path, "placer.plan", 1)
    assert str(path) in caught.value.message


def test_bytes_that_are_no_text_a_folder_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadFileError, match="cannot be read"):
        read_json(path, "placer.plan", 1)
    with pytest.raises(BadFileError, match="is a folder"):
        read_json(tmp_path, "placer.plan", 1)
    with pytest.raises(BadFileError, match="does not exist"):
        read_json(tmp_path / "none.json", "placer.plan", 1)

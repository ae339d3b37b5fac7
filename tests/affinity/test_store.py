"""Counts in a file: read back exactly, merged across files, refused when they are no counts."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from placer.affinity import count, read_affinity, write_affinity
from placer.errors import BadFileError, UsageError

from .reference import assert_same, random_trace


def test_counts_are_read_back_exactly(tmp_path):
    counts = count(random_trace(variable_k=True))
    path = tmp_path / "counts.npz"
    write_affinity(counts, path)
    found = read_affinity(path)
    for field in dataclasses.fields(counts):
        expected = getattr(counts, field.name)
        np.testing.assert_array_equal(getattr(found, field.name), expected)
        assert getattr(found, field.name).dtype == expected.dtype


def test_parts_from_two_files_add_up(tmp_path):
    trace = random_trace(num_tokens=50)
    first = np.arange(50) < 20
    write_affinity(count(trace.select(first)), tmp_path / "a.npz")
    write_affinity(count(trace.select(~first)), tmp_path / "b.npz")
    merged = read_affinity(tmp_path / "a.npz") + read_affinity(tmp_path / "b.npz")
    assert_same(merged, count(trace))


def test_a_file_is_not_replaced_silently(tmp_path):
    path = tmp_path / "counts.npz"
    write_affinity(count(random_trace()), path)
    with pytest.raises(UsageError, match="exists already"):
        write_affinity(count(random_trace()), path)
    write_affinity(count(random_trace(1)), path, force=True)
    assert [path] == list(tmp_path.iterdir())


def rewritten(path, **changes):
    """The counts in `path` with some keys changed; None removes one."""
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    content.update(changes)
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "placer.other"}, "is not a placer.affinity file"),
        ({"format": None}, "is not a placer.affinity file"),
        ({"schema_version": 2}, "schema_version 2, this placer reads up to 1"),
        ({"schema_version": 0}, r"schema_version 0, expected 1\.\.1"),
        ({"schema_version": None}, "schema_version"),
        ({"affinity": None}, "lacks affinity"),
        ({"affinity": np.zeros((2, 6, 6), np.float32)}, "affinity has type float32"),
        ({"affinity": np.zeros((2, 6, 5))}, r"affinity has shape \(2, 6, 5\)"),
        ({"coactivation": np.zeros((6, 6), np.int64)}, "damaged"),
        ({"coactivation": np.array(3)}, "damaged"),
        ({"k_histogram": np.zeros(3, np.int64)}, "damaged"),
        ({"affinity": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_another_file_is_refused(tmp_path, changes, message):
    path = tmp_path / "counts.npz"
    write_affinity(count(random_trace()), path)
    with pytest.raises(BadFileError, match=message):
        read_affinity(rewritten(path, **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", json.dumps({}).encode()])
def test_what_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "counts.npz"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=r"counts\.npz"):
        read_affinity(path)


def test_a_single_array_and_a_missing_file_and_a_folder_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(3))
    for name in ("one.npy", "missing.npz", "."):
        with pytest.raises(BadFileError):
            read_affinity(tmp_path / name)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "counts.npz"
    write_affinity(count(random_trace(num_experts=40)), path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(BadFileError):
            read_affinity(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(BadFileError):
        read_affinity(path)

"""`placer calibrate` refuses before it measures, and leaves nothing behind."""

from __future__ import annotations

import importlib.util

import pytest

from .running import fails

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs the extra trace",
)


def test_impossible_requests_are_refused_with_their_codes(tmp_path):
    output = ("-o", tmp_path / "here.toml")
    assert "fewer than 2 ranks" in fails(2, tmp_path, "calibrate", "--gpus", 1, *output)
    error = fails(2, tmp_path, "calibrate", "--gpus", 4, "--nodes", 3, *output)
    assert "3 nodes do not divide 4 ranks" in error
    error = fails(5, tmp_path, "calibrate", "--gpus", 2, "--model", tmp_path, *output)
    assert "holds no config.json" in error


def test_an_existing_file_is_not_replaced_and_nothing_is_measured(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text("mine")
    assert "exists already" in fails(2, tmp_path, "calibrate", "--gpus", 2, "-o", path)
    assert path.read_text() == "mine"

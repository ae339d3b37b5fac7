"""A plan that several tests of commands look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from .running import succeeds


@pytest.fixture(scope="session")
def plan_path(trace_folder, tmp_path_factory) -> Path:
    """A plan of `trace_folder` for 4 ranks, fitted to half of the requests."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 4, "-o", path)
    return path


@pytest.fixture(scope="session")
def decode_plan_path(trace_folder, tmp_path_factory) -> Path:
    """A plan with spare slots on two nodes, fitted to decode tokens only."""
    path = tmp_path_factory.mktemp("plans") / "decode.json"
    succeeds(
        "solve", trace_folder, "--gpus", 4, "--nodes", 2, "--slots-per-rank", 5, "--phase",
        "decode", "--dispatch", "coherent", "--seed", 3, "-o", path,
    )  # fmt: skip
    return path

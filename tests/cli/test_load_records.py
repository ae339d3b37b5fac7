"""Load records through the commands: import, inspect, solve; refused where tokens are needed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cli.running import fails, succeeds


@pytest.fixture
def load_npz(tmp_path):
    rng = np.random.default_rng(1)
    load = rng.poisson(np.tile(rng.gamma(0.7, 50, (1, 3, 16)), (6, 1, 1)))
    np.save(tmp_path / "counts.npy", load)
    path = tmp_path / "load.npz"
    done = succeeds(
        "import", tmp_path / "counts.npy", "--from", "matrix", "--layer-ids", "1,3-4", "-o", path,
        "--json",
    )  # fmt: skip
    assert done.document() == {
        "kind": "load", "path": str(path), "layers": 3, "experts": 16, "windows": 6,
        "pairs": int(load.sum()), "warnings": [],
    }  # fmt: skip
    return path


def test_a_load_record_is_solved_for_balance(load_npz, tmp_path):
    plan = tmp_path / "plan.json"
    asked = ("solve", load_npz, "--gpus", "4", "--objective", "balance", "--solver", "eplb")
    document = succeeds(*asked, "-o", plan, "--json").document()
    assert document["layer_ids"] == [1, 3, 4]
    assert document["prediction"]["scope"] == "held-out"
    figures = document["prediction"]["metrics"]
    assert figures["imbalance"]["value"] < 1.5
    assert "messages_alltoall" not in figures
    text = succeeds(*asked, "-o", plan, "--force").stdout
    assert "later windows than the plan was fitted to" in " ".join(text.split())
    assert "messages" not in text
    inspected = succeeds("inspect", plan, "--json").document()
    assert inspected["prediction"] == document["prediction"]


def test_a_load_record_is_inspected(load_npz):
    document = succeeds("inspect", load_npz, "--json").document()
    assert (document["kind"], document["windows"], document["experts"]) == ("load", 6, 16)
    assert "cannot be known" in succeeds("inspect", load_npz).stdout


@pytest.mark.parametrize(
    "command",
    [
        ("solve", "LOAD", "--gpus", "4", "-o", "PLAN"),
        ("solve", "LOAD", "LOAD", "--gpus", "4", "--objective", "balance", "-o", "PLAN"),
        ("analyze", "LOAD"),
        ("compare", "LOAD", "--gpus", "4"),
    ],
)
def test_what_needs_tokens_is_refused_with_the_reason(load_npz, tmp_path, command):
    names = {"LOAD": load_npz, "PLAN": tmp_path / "plan.json"}
    assert "load record" in fails(2, tmp_path, *(names.get(word, word) for word in command))


def test_bad_layer_ids_are_refused(tmp_path):
    np.save(tmp_path / "counts.npy", np.ones((2, 4)))
    for text in ("a", "3-", "4,3", "2-1"):
        told = fails(
            2, tmp_path, "import", tmp_path / "counts.npy", "--from", "matrix", "--layer-ids", text,
            "-o", tmp_path / "x.npz",
        )  # fmt: skip
        assert "--layer-ids" in told

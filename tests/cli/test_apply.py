"""`placer apply`: real processes for what it does, none for what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path

import pytest

from placer.placement import contiguous
from placer.plan import Plan, write_plan
from placer.trace.model import ModelDims

from .running import fails, succeeds, usage_error

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs the trace extra",
)


def plan_for(folder: Path, num_layers: int = 8, num_experts: int = 32, **model: int) -> Path:
    """A contiguous plan for 2 ranks."""
    placement = contiguous(num_layers, num_experts, 2, num_experts // 2, 1)
    path = folder / f"plan-{num_layers}-{num_experts}.json"
    write_plan(Plan(placement, tuple(range(num_layers)), ModelDims(**model)), path, force=True)
    return path


def test_it_loads_checks_generates_and_says_what_was_sent(tmp_path):
    plan = plan_for(tmp_path)
    document = succeeds(
        "apply", plan, "--model", MODEL, "--prompt", "def main", "--prompt", "The",
        "--dispatch", "coherent", "--max-new-tokens", 3, "--dtype", "float32", "--json",
    ).document()  # fmt: skip
    assert document["slots_checked"] == 8 * 32
    assert document["dispatch"] == "coherent"
    assert [rank["experts"] for rank in document["ranks"]] == [128, 128]
    assert [len(request["tokens"]) for request in document["requests"]] == [3, 3]
    assert all(request["text"] for request in document["requests"])
    sent = [rank["counters"]["messages"]["other_node"] for rank in document["ranks"]]
    assert min(sent) > 0
    assert "--nnodes=2 --nproc-per-node=1" in document["several_hosts"]


def test_a_dry_run_counts_moves_and_loads_nothing(tmp_path):
    plan = plan_for(tmp_path)
    other = tmp_path / "other.json"
    table = contiguous(8, 32, 2, 16, 1).physical_to_logical.copy()
    table[0, [0, 31]] = table[0, [31, 0]]  # an exchange in the first layer: two moves
    write_plan(Plan(type(contiguous(8, 32, 2, 16, 1))(table, 32, 2, 1), tuple(range(8))), other)
    document = succeeds(
        "apply", plan, "--model", MODEL, "--dry-run", "--against", other, "--json"
    ).document()
    moves = document["moves"]
    assert (moves["moves"], moves["moves_other_node"], moves["kept"]) == (2, 2, 254)
    assert moves["bytes"] == 2 * document["expert_bytes"]
    shares = [rank["share_bytes"] for rank in document["ranks"]]
    assert shares == [document["other_bytes"] + 128 * document["expert_bytes"]] * 2
    shown = succeeds("apply", plan, "--model", MODEL, "--dry-run", "--against", other).stdout
    assert "2 copies of experts to fetch" in shown
    assert "nothing was loaded" in shown


def test_moves_between_other_ranks_are_refused(tmp_path):
    plan = plan_for(tmp_path)
    other = tmp_path / "other.json"
    write_plan(Plan(contiguous(8, 32, 4, 8, 1), tuple(range(8))), other)
    said = fails(2, tmp_path, "apply", plan, "--model", MODEL, "--dry-run", "--against", other)
    assert "the plans differ in num ranks: 2, and 4 in --against" in said


def test_against_without_dry_run_is_refused(tmp_path):
    plan = plan_for(tmp_path)
    assert "--dry-run" in fails(2, tmp_path, "apply", plan, "--model", MODEL, "--against", plan)


@pytest.mark.parametrize(
    ("layers", "experts", "model", "expected"),
    [
        (8, 16, {}, "places 16 experts per layer, the model has 32"),
        (4, 32, {}, "is for MoE layers 0, 1, 2, 3, the model has 0, 1, 2, 3, ... (8 layers)"),
        (8, 32, {"hidden_size": 64}, "is for a model of hidden size 64, this one has 128"),
    ],
)
def test_a_plan_for_another_model_is_refused(tmp_path, layers, experts, model, expected):
    plan = plan_for(tmp_path, layers, experts, **model)
    said = fails(2, tmp_path, "apply", plan, "--model", MODEL, "--dry-run")
    assert expected in said


def test_ranks_refuse_a_plan_for_another_model_too(tmp_path):
    plan = plan_for(tmp_path, 8, 16)
    said = fails(2, tmp_path, "apply", plan, "--model", MODEL)
    assert "error: rank " in said
    assert "places 16 experts per layer, the model has 32" in said


def test_a_port_in_use_is_named(tmp_path):
    plan = plan_for(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails(1, tmp_path, "apply", plan, "--model", MODEL, "--master-port", port)
    assert f"port {port} on 127.0.0.1 is in use" in said


def damaged(folder: Path, what: str) -> Path:
    """The shipped model with something wrong."""
    copy = folder / "model"
    shutil.copytree(MODEL, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    if what == "no weights":
        weights.unlink()
    elif what == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif what == "no config":
        config.unlink()
    elif what == "config cut off":
        config.write_text(config.read_text()[:100])
    else:
        values = json.loads(config.read_text())
        values |= {
            "unknown model": {"model_type": "nothing"},
            "dense model": {"mlp_only_layers": list(range(8))},
            "quantised": {"quantization_config": {"quant_method": "mxfp4"}},
        }[what]
        config.write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    ("what", "code", "expected"),
    [
        ("no weights", 5, "holds no safetensors checkpoint"),
        ("weights cut off", 5, "model.safetensors cannot be read"),
        ("no config", 5, "holds no config.json"),
        ("config cut off", 5, "config.json cannot be used"),
        ("unknown model", 5, "config.json cannot be used"),
        ("dense model", 1, "has no mixture-of-experts layers"),
        ("quantised", 1, "holds quantised weights"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, what, code, expected):
    plan, model = plan_for(tmp_path), damaged(tmp_path, what)
    said = fails(code, tmp_path, "apply", plan, "--model", model, "--dry-run")
    assert expected in said


def test_missing_files_are_named(tmp_path):
    plan = plan_for(tmp_path)
    missing = tmp_path / "nothing"
    assert f"{missing} does not exist" in fails(5, tmp_path, "apply", missing, "--model", MODEL)
    assert "holds no config.json" in fails(
        5, tmp_path, "apply", plan, "--model", missing, "--dry-run"
    )
    prompts = ("--prompts", missing.with_suffix(".txt"))
    assert "does not exist" in fails(5, tmp_path, "apply", plan, "--model", MODEL, *prompts)


def test_odd_options_are_refused(tmp_path):
    plan = plan_for(tmp_path)
    usage_error(tmp_path, "apply", plan)
    usage_error(tmp_path, "apply", plan, "--model", MODEL, "--max-new-tokens", 0)
    said = fails(2, tmp_path, "apply", plan, "--model", MODEL, "--dtype", "int3", "--dry-run")
    assert "int3" in said


def test_it_says_what_to_install(tmp_path, monkeypatch):
    plan = plan_for(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    said = fails(1, tmp_path, "apply", plan, "--model", MODEL, "--dry-run")
    assert "this needs safetensors" in said
    assert "moe-placer[trace]" in said

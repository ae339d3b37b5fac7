"""`--model` and `--expert-groups` in `placer solve`, `compare` and `sweep`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from placer.plan import read_plan
from placer.planning import open_traces
from placer.planning.baselines import solved_baseline

from .running import fails, succeeds

DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
    "moe_intermediate_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 0, "n_group": 4,
    "topk_group": 2,
}  # fmt: skip
NODES = ("--gpus", 4, "--nodes", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The configuration of a model like DeepSeek-V3, as small as the tests' traces."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    return folder


def groups_stay_on_a_node(placement, num_groups: int = 4) -> bool:
    for row in placement.physical_to_logical.reshape(placement.num_layers, 2, -1):
        for experts in np.arange(16).reshape(num_groups, -1):
            if sum(np.isin(experts, node).all() for node in row) != 1:
                return False
    return True


def test_eplb_keeps_the_groups_that_the_user_names_on_a_node(trace_folder, tmp_path):
    asked = ("solve", trace_folder, *NODES, "--solver", "eplb", "-o")
    succeeds(*asked, tmp_path / "grouped.json", "--expert-groups", 4)
    succeeds(*asked, tmp_path / "plain.json")
    grouped, plain = (read_plan(tmp_path / f"{name}.json") for name in ("grouped", "plain"))
    assert groups_stay_on_a_node(grouped.placement)
    assert not groups_stay_on_a_node(plain.placement)
    groups = [plan.provenance["settings"]["expert_groups"] for plan in (grouped, plain)]
    assert groups == [4, 1]
    sources = open_traces([trace_folder])
    assert groups_stay_on_a_node(solved_baseline("eplb", grouped, sources))
    assert not groups_stay_on_a_node(solved_baseline("eplb", plain, sources))


def test_the_groups_of_the_model_are_the_default(trace_folder, checkpoint, tmp_path):
    asked = ("solve", trace_folder, *NODES, "--solver", "eplb", "--model", checkpoint, "-o")
    succeeds(*asked, tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    assert groups_stay_on_a_node(plan.placement)
    assert plan.provenance["settings"]["expert_groups"] == 4
    succeeds(*asked, tmp_path / "none.json", "--expert-groups", 1)
    assert not groups_stay_on_a_node(read_plan(tmp_path / "none.json").placement)
    assert "16 per layer, top-4, in 4 groups" in succeeds("model", checkpoint).stdout


def test_a_load_record_knows_groups_too(tmp_path):
    load = np.random.default_rng(1).poisson(50, (6, 3, 16))
    np.save(tmp_path / "counts.npy", load)
    record = tmp_path / "load.npz"
    succeeds("import", tmp_path / "counts.npy", "--from", "matrix", "-o", record)
    asked = ("solve", record, *NODES, "--objective", "balance", "--solver", "eplb", "-o")
    succeeds(*asked, tmp_path / "plan.json", "--expert-groups", 4)
    assert groups_stay_on_a_node(read_plan(tmp_path / "plan.json").placement)
    error = fails(2, tmp_path, *asked, tmp_path / "no.json", "--model", "deepseek-v3")
    assert "58 MoE layers of 256 experts, the trace 3 of 16" in error


@pytest.mark.parametrize("command", ["solve", "compare"])
def test_groups_that_do_not_divide_the_experts_are_refused(command, trace_folder, tmp_path):
    output = ("-o", tmp_path / "plan.json") if command == "solve" else ()
    error = fails(2, tmp_path, command, trace_folder, *NODES, "--expert-groups", 3, *output)
    assert "3 expert groups do not divide 16 experts" in error


def test_compare_counts_the_named_model(trace_folder, checkpoint, tmp_path):
    asked = ("compare", trace_folder, "--gpus", 4, "--solvers", "contiguous,eplb")
    machine = ("--cluster", "h100-nvl8", "--model", checkpoint)
    document = succeeds(*asked, *machine, "--json").document()
    times = document["step_time"]
    assert times["cluster"] == "h100-nvl8"
    assert list(times)[1:] == ["contiguous", "eplb"]
    plan = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--solver", "eplb", *machine, "-o", plan)
    assert times["eplb"] == read_plan(plan).prediction["step_time"]["plan"]
    assert "modelled step time" in succeeds(*asked, *machine).stdout
    assert "step_time" not in succeeds(*asked, "--json").document()


def test_compare_refuses_what_solve_refuses(trace_folder, checkpoint, tmp_path):
    asked = ("compare", trace_folder, "--gpus", 4, "--solvers", "contiguous")
    machine = ("--cluster", "h100-nvl8", "--model", checkpoint)
    full = fails(3, tmp_path, *asked, *machine, "--kv-tokens", 10**12)
    assert "of KV" in full
    assert "--model" in fails(2, tmp_path, *asked, "--kv-tokens", 1000)
    assert "the model that was traced" in fails(2, tmp_path, *asked, "--model", "deepseek-v3")

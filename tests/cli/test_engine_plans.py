"""`placer export` and `placer import` of engines' plans."""

from __future__ import annotations

import json

import numpy as np
import pytest

from placer.engines.registry import ENGINES
from placer.plan import read_plan

from .running import fails, succeeds, usage_error

SUFFIX = {
    "vllm": ".json",
    "sglang": ".json",
    "tensorrt-llm": ".yaml",
    "vllm-ascend": ".json",
    "omni-infer": ".npy",
    "eplb": ".safetensors",
    "fastdeploy": ".json",
    "rank-lists": ".json",
}


def test_every_engine_has_a_place_here():
    assert set(SUFFIX) == set(ENGINES)


@pytest.mark.parametrize("engine", SUFFIX)
def test_a_plan_goes_to_an_engine_and_back_and_is_judged_the_same(
    engine, plan_path, trace_folder, tmp_path
):
    pytest.importorskip("safetensors")
    theirs, back = tmp_path / f"engine{SUFFIX[engine]}", tmp_path / "back.json"
    said = succeeds("export", plan_path, "--to", engine, "-o", theirs, "--json").document()
    assert said["engine"] == engine
    ours = read_plan(plan_path)
    ids = ",".join(map(str, ours.layer_ids))
    made = succeeds(
        "import", theirs, "--from", engine, "--gpus", 4, "--layer-ids", ids, "-o", back, "--json"
    ).document()
    assert made["kind"] == "plan"
    assert made["layer_ids"] == list(ours.layer_ids)
    figures = [
        succeeds("evaluate", plan, trace_folder, "--all-requests", "--json").document()["metrics"]
        for plan in (plan_path, back)
    ]
    assert figures[0] == figures[1]


def test_people_read_what_to_serve_with(plan_path, tmp_path):
    out = succeeds("export", plan_path, "--to", "sglang", "-o", tmp_path / "map.json").stdout
    assert "--ep-size 4 --ep-num-redundant-experts 0" in " ".join(out.split())
    out = succeeds(
        "import", tmp_path / "map.json", "--from", "sglang", "--gpus", 4, "--nodes", 2,
        "-o", tmp_path / "plan.json",
    ).stdout  # fmt: skip
    assert "4 ranks (2 nodes)" in " ".join(out.split())


def test_a_plan_with_empty_slots_is_refused_and_can_be_filled(plan_path, tmp_path):
    document = json.loads(plan_path.read_text())
    rows = np.array(document["physical_to_logical"]).reshape(-1, 4, document["slots_per_rank"])
    spare = np.full((*rows.shape[:2], 1), -1)
    spare[0, 0] = next(e for e in range(16) if e not in rows[0, 0])
    document["physical_to_logical"] = (
        np.concatenate([rows, spare], 2).reshape(len(rows), -1).tolist()
    )
    document["slots_per_rank"] += 1
    (tmp_path / "plan.json").write_text(json.dumps(document))
    command = ("export", tmp_path / "plan.json", "--to", "vllm-ascend", "-o", tmp_path / "map.json")
    refused = fails(3, tmp_path, *command)
    assert "leaves 1 of 5 empty" in refused
    assert "--fill-empty" in refused
    succeeds(*command, "--fill-empty")


def test_impossible_requests_are_refused(plan_path, tmp_path):
    out = tmp_path / "map.json"
    fails(2, tmp_path, "export", plan_path, "--to", "triton", "-o", out)
    fails(2, tmp_path, "export", plan_path, "--to", "tensorrt-llm", "-o", out)
    fails(2, tmp_path, "export", plan_path, "--to", "sglang", "-o", tmp_path / "no" / "map.json")
    fails(2, tmp_path, "export", plan_path, "--to", "sglang", "--num-layers", 1, "-o", out)
    fails(5, tmp_path, "export", tmp_path / "none.json", "--to", "sglang", "-o", out)
    usage_error(tmp_path, "export", plan_path, "-o", out)
    out.write_text("{}")
    fails(2, tmp_path, "export", plan_path, "--to", "sglang", "-o", out)
    fails(5, tmp_path, "import", out, "--from", "sglang", "--gpus", 4, "-o", tmp_path / "p.json")
    succeeds("export", plan_path, "--to", "sglang", "-o", out, "--force")
    fails(2, tmp_path, "import", out, "--from", "sglang", "-o", tmp_path / "p.json")
    asked = ("--from", "sglang", "--gpus", 4, "-o", tmp_path / "p.json")
    missing = fails(5, tmp_path, "import", tmp_path / "none.json", *asked)
    assert "does not exist" in missing
    fails(2, tmp_path, "import", out, "--from", "sglang", "--gpus", 4, "-o", tmp_path / "folder")
    fails(2, tmp_path, "import", out, "--from", "sglang", "--gpus", 4, "-o", out)
    fails(2, tmp_path, "import", out, "--from", "npz", "--gpus", 4, "-o", tmp_path / "t")

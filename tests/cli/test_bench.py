"""`placer bench`: real processes for what it measures, none for what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from placer.placement import Placement, contiguous
from placer.plan import Plan, write_plan

from .running import fails, succeeds

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
PROMPTS = ("def main", "The", "int x")
EXACT = dict.fromkeys(("messages", "hidden_bytes", "routing_bytes", "kv_bytes", "pairs"), True)
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs the trace extra",
)


def plan_for(folder: Path, *, reverse: bool = False, num_ranks: int = 2) -> Path:
    """A plan for nodes of 1 rank; contiguous, or every expert where the last ones were."""
    table = contiguous(8, 32, num_ranks, 32 // num_ranks, 1).physical_to_logical
    if reverse:
        table = np.roll(table, 7, axis=1)
    path = folder / ("moved.json" if reverse else f"plan-{num_ranks}.json")
    write_plan(Plan(Placement(table, 32, num_ranks, 1), tuple(range(8))), path, force=True)
    return path


def arguments(plan: Path, *more: object) -> list[object]:
    given: list[object] = ["bench", plan, "--model", MODEL, "--dtype", "float32"]
    for prompt in PROMPTS:
        given += ["--prompt", prompt]
    return [*given, "--max-new-tokens", 3, "--batch-size", 2, *more]


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """Folder, and the document of 2 repeats; then 3 were asked for, of the same folder."""
    folder = tmp_path_factory.mktemp("bench")
    plan, other = plan_for(folder, reverse=True), plan_for(folder)
    common = ("--baseline", "contiguous", "--baseline", other, "-o", folder / "kept", "--json")
    cluster = ("--cluster", "local-cpu")
    first = succeeds(*arguments(plan, "--repeats", 2, *cluster, *common)).document()
    kept = {path.name: path.read_bytes() for path in (folder / "kept").iterdir()}
    more = succeeds(*arguments(plan, "--repeats", 3, *common)).document()
    return folder, first, kept, more


def test_what_is_counted_is_what_the_replay_predicts(benched):
    _, document, _, _ = benched
    assert list(document["arms"])[:2] == ["plan", "contiguous"]
    for arm in document["arms"].values():
        assert arm["exact"] == EXACT
        assert arm["repeats_counted_the_same"]
        assert arm["same_tokens_as_plan"]
        measured = arm["measured"]
        assert measured["messages"]["other_node"] > 0
        assert measured["messages"]["same_node"] == 0
        assert measured["hidden_bytes"]["other_node"] == measured["messages"]["other_node"] * 512
    plan, base = (document["arms"][name]["measured"] for name in ("plan", "contiguous"))
    assert plan["pairs"] != base["pairs"]


def test_equal_placements_count_the_same(benched):
    folder, document, _, _ = benched
    one, other = (document["arms"][name] for name in ("contiguous", str(folder / "plan-2.json")))
    for key in ("messages", "pairs", "imbalance"):
        assert one["measured"][key] == other["measured"][key]
    assert one["predicted"] == other["predicted"]


def test_times_add_up_and_predictions_stand_beside_them(benched):
    _, document, _, _ = benched
    for arm in document["arms"].values():
        measured, error = arm["measured"], arm["error"]
        for part in ("dispatch", "compute", "combine"):
            assert len(measured["seconds_by_layer"][part]) == 8
            modelled = arm["predicted"]["seconds"][part]
            assert modelled / measured["seconds"][part] - 1 == pytest.approx(error[part])
            assert sum(arm["predicted"]["seconds_by_layer"][part]) == pytest.approx(modelled)
        phases = arm["predicted"]["seconds_by_phase"]
        for part, modelled in arm["predicted"]["seconds"].items():
            assert sum(phase[part] for phase in phases.values()) == pytest.approx(modelled)
    factor = document["arms"]["contiguous"]["plan_against_it"]
    assert factor["measured_range"][0] <= factor["measured"] <= factor["measured_range"][1]
    for found in (factor, *factor["by_phase"].values()):
        assert found["predicted"] / found["measured"] - 1 == pytest.approx(found["error"])
    assert list(factor["by_phase"]) == ["prefill", "decode"]


def test_a_bench_goes_on_where_it_was(benched):
    folder, document, kept, more = benched
    assert sorted(kept) == ["repeat-000.json", "repeat-001.json"]
    assert (document["repeats_made_now"], more["repeats_made_now"]) == (2, 1)
    assert more["repeats"] == 3
    for name, content in kept.items():
        assert (folder / "kept" / name).read_bytes() == content
    rates = [
        json.loads(path.read_text())["arms"]["plan"]["tokens_per_second"]
        for path in (folder / "kept").iterdir()
    ]
    assert more["arms"]["plan"]["measured"]["tokens_per_second"] == sorted(rates)[1]
    assert more["arms"]["plan"]["error"] is None  # no --cluster, no times


def test_every_repeat_starts_with_another_arm(benched):
    _, _, kept, _ = benched
    first = [next(iter(json.loads(kept[name])["arms"])) for name in sorted(kept)]
    assert first == ["plan", "contiguous"]


def test_a_bench_of_other_settings_is_refused_and_shown_for_people(benched):
    folder, *_ = benched
    plan = folder / "moved.json"
    other = fails(2, folder, *arguments(plan, "--batch-size", 3, "-o", folder / "kept"))
    assert "batch_size" in other


@pytest.fixture(scope="module")
def top_1(tmp_path_factory):
    """The shipped model with one expert per token."""
    folder = tmp_path_factory.mktemp("top-1") / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    return folder


def test_ways_of_dispatch_take_turns_and_send_what_is_predicted(top_1, tmp_path):
    ways = ("coherent", "alltoall", "alltoall-by-node", "allgather")
    asked = [part for way in ways for part in ("--dispatch", way)]
    plan = plan_for(tmp_path, reverse=True)
    more = ("--repeats", 1, "--cluster", "local-cpu", "--model", top_1, "--json", *asked)
    arms = succeeds(*arguments(plan, *more)).document()["arms"]
    assert [arm["dispatch"] for arm in arms.values()] == [*ways, *ways]
    assert list(arms)[:2] == ["plan", "plan (alltoall)"]
    for arm in arms.values():
        assert arm["exact"] == EXACT
        assert arm["repeats_counted_the_same"]
        assert arm["same_tokens_as_plan"]
        assert arm["predicted"]["seconds"]["context"] > 0
    moving, fixed = arms["plan"]["measured"], arms["plan (alltoall)"]["measured"]
    # 2 batches of 3 passes and 8 layers; all passes there and back, or only the first of each
    assert fixed["collectives"]["all_to_all"] == 2 * 8 * 3 * 2
    assert moving["collectives"]["all_to_all"] == 2 * 8 * (2 + 2)


def test_plans_run_as_they_were_made_for(top_1, tmp_path):
    plan, other = plan_for(tmp_path), tmp_path / "coherent.json"
    table = contiguous(8, 32, 2, 16, 1)
    write_plan(Plan(table, tuple(range(8)), dispatch="coherent"), other)
    more = ("--repeats", 1, "--model", top_1, "--baseline", other, "--baseline", "contiguous")
    document = succeeds(*arguments(plan, *more, "--json")).document()
    found = {name: arm["dispatch"] for name, arm in document["arms"].items()}
    assert found == {"plan": "alltoall", str(other): "coherent", "contiguous": "alltoall"}
    kv = {name: arm["measured"]["kv_bytes"]["other_node"] for name, arm in document["arms"].items()}
    tokens = document["prompt_tokens"] + len(PROMPTS) * 2  # the last ones made are never fed in
    assert kv == {"plan": 0, str(other): tokens * 8 * 2 * 64 * 4, "contiguous": 0}


def test_people_see_a_table(tmp_path):
    shown = succeeds(*arguments(plan_for(tmp_path, num_ranks=1), "--repeats", 1)).stdout
    titles = ("speed", "phases", "times", "sent", "by MoE layer")
    for text in (*titles, "exactly", "1 rank,", "1 repeat in turn"):
        assert text in shown


def test_what_cannot_be_measured_is_refused(tmp_path):
    plan = plan_for(tmp_path)
    assert "nothing to generate" in fails(2, tmp_path, "bench", plan, "--model", MODEL)
    missing = tmp_path / "none.json"
    assert "does not exist" in fails(5, tmp_path, *arguments(missing))
    assert "--trace" in fails(2, tmp_path, *arguments(plan, "--baseline", "eplb"))
    assert "no baseline" in fails(2, tmp_path, *arguments(plan, "--baseline", "nonsense"))
    twice = ("--baseline", "contiguous", "--baseline", "contiguous")
    assert "twice" in fails(2, tmp_path, *arguments(plan, *twice))
    other = plan_for(tmp_path, num_ranks=4)
    assert "4 ranks" in fails(2, tmp_path, *arguments(plan, "--baseline", other))


def test_a_damaged_repeat_is_refused(tmp_path):
    plan = plan_for(tmp_path, num_ranks=1)
    kept = tmp_path / "kept"
    kept.mkdir()
    path = kept / "repeat-000.json"
    path.write_text('{"format": "placer.bench-repeat", "schema_version": 1}')
    assert "has no settings" in fails(5, tmp_path, *arguments(plan, "-o", kept))
    path.write_text('{"format": "placer.bench-repeat", "sch')
    assert "not valid JSON" in fails(5, tmp_path, *arguments(plan, "-o", kept))
    assert "folder" in fails(2, tmp_path, *arguments(plan, "-o", path))

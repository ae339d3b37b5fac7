"""`placer solve`: frontier, workloads, moves, pins and budgets from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import topic_trace

from placer.plan import read_plan
from placer.report.plans import plan_summary
from placer.trace import write_npz

from .running import fails, succeeds


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "topics.npz"
    write_npz(topic_trace(num_requests=32, prefill=6, decode=6), path)
    return path


def test_pareto_writes_the_knee_and_every_point(trace_file, tmp_path):
    path = tmp_path / "plan.json"
    outcome = succeeds("solve", trace_file, "--gpus", 4, "--pareto", "-o", path)
    assert "<- knee" in outcome.stdout
    folder = tmp_path / "plan.frontier"
    document = json.loads((folder / "frontier.json").read_text())
    knee = next(point for point in document["points"] if point["knee"])
    assert (folder / knee["plan"]).read_bytes() == path.read_bytes()
    assert "<svg" in (folder / "frontier.svg").read_text()
    before = sorted(p.name for p in tmp_path.iterdir())
    fails(2, tmp_path, "solve", trace_file, "--gpus", 4, "--pareto", "-o", tmp_path / "plan.json")
    again = succeeds("solve", trace_file, "--gpus", 4, "--pareto", "--force", "--json", "-o", path)
    assert again.document()["points"] == document["points"]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_pareto_goes_through_all_caps(trace_file, tmp_path):
    arguments = ("--gpus", 4, "--pareto", "--max-imbalance", 1.2, "-o", tmp_path / "p.json")
    error = fails(2, tmp_path, "solve", trace_file, *arguments)
    assert "leave out --max-imbalance" in error


@pytest.mark.parametrize(
    "option", [("--objective", "balance"), ("--solver", "eplb"), ("--certify", 1)]
)
def test_pareto_refuses_what_it_would_not_heed(trace_file, tmp_path, option):
    arguments = ("--gpus", 4, "--pareto", *option, "-o", tmp_path / "p.json")
    assert "--pareto" in fails(2, tmp_path, "solve", trace_file, *arguments)


def test_a_plan_is_changed_by_few_moves(trace_file, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    succeeds("solve", trace_file, "--gpus", 4, "--solver", "contiguous", "-o", first)
    outcome = succeeds(
        "solve", trace_file, "--gpus", 4, "--start", first, "--max-moves", 8,
        "--max-imbalance", "none", "-o", second,
    )  # fmt: skip
    old, new = (read_plan(p).placement.physical_to_logical for p in (first, second))
    moved = sum(
        len(set(a.tolist()) - set(b.tolist()))
        for x, y in zip(new, old, strict=True)
        for a, b in zip(x.reshape(4, -1), y.reshape(4, -1), strict=True)
    )
    assert 0 < moved <= 8
    assert f"{moved} expert copies moved from {first}" in outcome.stdout


@pytest.mark.parametrize(
    ("termination", "said"),
    [("time_limit", "ended by the time limit"), ("interrupted", "ended by Ctrl-C")],
)
def test_a_search_that_was_cut_short_says_so(trace_file, tmp_path, termination, said):
    path = tmp_path / "a.json"
    arguments = ("--gpus", 4, "--solver", "contiguous", "--max-imbalance", "none", "-o", path)
    assert "ended by" not in succeeds("solve", trace_file, *arguments).stdout
    document = {"path": "a.json", **json.loads(path.read_text())}
    document["certificate"]["termination"] = termination
    assert said in str(plan_summary(document)[-1])


def test_moves_need_a_plan_to_count_from(trace_file, tmp_path):
    arguments = ("solve", trace_file, "--gpus", 4, "--max-moves", 3, "-o", tmp_path / "p.json")
    assert "--start" in fails(2, tmp_path, *arguments)


def test_a_plan_for_other_ranks_is_no_start(trace_file, tmp_path):
    first = tmp_path / "a.json"
    succeeds("solve", trace_file, "--gpus", 2, "--solver", "contiguous", "-o", first)
    arguments = ("solve", trace_file, "--gpus", 4, "--start", first, "-o", tmp_path / "b.json")
    assert "same model and ranks" in fails(2, tmp_path, *arguments)


def test_pins_are_kept(trace_file, tmp_path):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_file, "--gpus", 4, "--pin", "5@3", "--pin", "2:7@0", "-o", path)
    rows = read_plan(path).placement.physical_to_logical.reshape(6, 4, 4)
    assert all(5 in rows[layer, 3] for layer in range(6))
    assert 7 in rows[1, 0]


def test_a_slot_budget_is_spent_where_it_helps(trace_file, tmp_path):
    path = tmp_path / "plan.json"
    succeeds(
        "solve", trace_file, "--gpus", 4, "--slots-per-rank", 6, "--slot-budget", 27, "-o", path
    )
    filled = (read_plan(path).placement.physical_to_logical.reshape(6, 4, 6) >= 0).sum(axis=2)
    assert filled.sum(axis=0).max() <= 27
    assert filled.max() > 4
    assert np.ptp(filled.max(axis=1)) >= 1


def test_too_small_a_slot_budget_is_infeasible(trace_file, tmp_path):
    arguments = ("--gpus", 4, "--slot-budget", 20, "-o", tmp_path / "p.json")
    assert "need 24" in fails(3, tmp_path, "solve", trace_file, *arguments)


def test_robust_plans_show_each_workload(trace_file, tmp_path):
    path = tmp_path / "plan.json"
    outcome = succeeds(
        "solve", trace_file, "--gpus", 4, "--robust", "worst", "--max-imbalance", 2, "-o", path
    )
    for name in ("code", "maths", "prose"):
        assert name in outcome.stdout

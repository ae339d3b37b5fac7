"""`placer certify`, `placer solve --objective affinity|coactivation` and `--certify`."""

from __future__ import annotations

import json

import pytest

from placer.plan import read_plan
from placer.trace import write_npz
from tests.conftest import topic_trace

from .running import fails, succeeds

FIGURE = {"affinity": "cross_rank_fraction", "coactivation": "coactivation_cut"}


@pytest.mark.parametrize("objective", FIGURE)
def test_solve_minimises_and_certifies_what_pairs_are_about(trace_folder, tmp_path, objective):
    path = tmp_path / "plan.json"
    run = succeeds("solve", trace_folder, "--gpus", 4, "--objective", objective, "-o", path)
    assert "proven lower bound" in run.stdout
    certificate = read_plan(path).certificate
    assert certificate["objective"] == objective
    assert certificate["bound_of"] == FIGURE[objective]
    assert certificate["value"] == certificate["parts"][FIGURE[objective]]
    assert certificate["lower_bound"] <= certificate["value"]
    if certificate["status"] != "optimal":
        assert [bound["figure"] for bound in certificate["bounds"]] == [FIGURE[objective]]
    again = tmp_path / "again.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--objective", objective, "-o", again)
    one, other = (json.loads(file.read_text()) | {"timings": {}} for file in (path, again))
    assert one == other


def test_certify_bounds_any_plan_and_the_plan_for_it_meets_the_bound(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    succeeds(
        "solve", trace_folder, "--gpus", 4, "--objective", "affinity", "--in-sample", "-o", path
    )
    document = succeeds(
        "certify", path, trace_folder, "--seconds", 5, "--figure", "cross_rank_fraction", "--json"
    ).document()
    (bound,) = document["bounds"]
    assert bound["figure"] == "cross_rank_fraction"
    assert bound["value"] == pytest.approx(read_plan(path).certificate["value"], abs=1e-12)
    assert 0 < bound["lower_bound"] <= bound["value"]
    assert bound["gap"] < 0.05
    load_only = tmp_path / "load.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--objective", "balance", "-o", load_only)
    shown = succeeds("certify", load_only, trace_folder, "--seconds", 2).stdout
    assert "cross-rank fraction" in shown
    assert "gap at most" in shown


def test_certify_says_whose_tokens_its_figures_are_of(plan_path, trace_folder, tmp_path):
    asked = ("--seconds", 1, "--figure", "coactivation_cut")
    assert "IN-SAMPLE" in succeeds("certify", plan_path, trace_folder, *asked).stdout
    own = succeeds("certify", plan_path, trace_folder, *asked, "--json").document()
    assert own["scope"] == "in-sample"
    write_npz(topic_trace(seed=7), other := tmp_path / "other.npz")
    assert "unseen" in succeeds("certify", plan_path, other, *asked).stdout


def test_certify_in_solve_goes_into_the_plan_file(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    run = succeeds("solve", trace_folder, "--gpus", 4, "--certify", 2, "-o", path)
    bounds = {bound["figure"]: bound for bound in read_plan(path).certificate["bounds"]}
    assert {"cross_rank_fraction", "coactivation_cut"} <= set(bounds)
    parts = read_plan(path).certificate["parts"]
    for figure, bound in bounds.items():
        assert bound["value"] == parts[figure]
        assert bound["lower_bound"] <= bound["value"]
    assert "no plan is below the bound" in run.stdout


def test_what_certify_refuses(plan_path, trace_folder, tmp_path):
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text(plan_path.read_text()[:100])
    document = json.loads(plan_path.read_text())
    other.write_text(json.dumps(document | {"layer_ids": [i + 7 for i in document["layer_ids"]]}))
    asked = ("certify", plan_path, trace_folder, "--figure", "beauty")
    assert "cross_rank_fraction" in fails(2, tmp_path, *asked)
    nearly = ("certify", plan_path, trace_folder, "--figure", "coactivation")
    assert "did you mean coactivation_cut?" in fails(2, tmp_path, *nearly)
    fails(5, tmp_path, "certify", tmp_path / "nothing.json", trace_folder)
    fails(5, tmp_path, "certify", plan_path, tmp_path / "nothing")
    fails(5, tmp_path, "certify", broken, trace_folder)
    assert "own model" in fails(2, tmp_path, "certify", other, trace_folder)

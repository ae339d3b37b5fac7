"""`placer analyze`: the verdict first; the deep part on request."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from placer.report.analysis import analysis_tables
from placer.studies.verdict import verdict
from placer.trace import write_npz
from tests.conftest import topic_trace

from .running import fails, succeeds


@pytest.fixture(scope="module")
def deep_document(trace_folder):
    return succeeds(
        "analyze", trace_folder, "--gpus", 4, "--gpus", 2, "--deep", "--json"
    ).document()


def test_the_verdict_comes_first(trace_folder):
    outcome = succeeds("analyze", trace_folder, "--gpus", 4)
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith("placement can help at 4 ranks: traffic")
    assert lines[1].split()[0] == "traffic"
    for title in ("without replicas", "workloads", "segments of a request", "hit rate"):
        assert title in outcome.stdout
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert outcome.stderr == ""


def test_what_was_not_computed_takes_no_columns(deep_document):
    """The demo leaves the order of tokens out."""
    shown = {}
    for name, document in {"whole": deep_document, "demo": dict(deep_document)}.items():
        if name == "demo":
            del document["routing"]
        with (console := Console(width=160)).capture() as captured:
            for part in analysis_tables(document):
                console.print(part)
        shown[name] = captured.get().split("without replicas")[1].split("workloads")[0]
    assert "by groups" in shown["whole"]
    assert "kept" not in shown["demo"]
    assert "–" not in shown["demo"]


def test_deep_adds_plans_judged_on_held_out_requests(trace_folder, deep_document):
    assert list(deep_document) == [
        "path", "overall", "phases", "labels", "drift", "routing", "deep", "verdict",
    ]  # fmt: skip
    deep = deep_document["deep"]
    assert deep["num_ranks"] == deep_document["verdict"]["num_ranks"] == 4
    assert not deep["interrupted"]
    assert "fewer" in deep_document["verdict"]["reasons"]["traffic"]
    outcome = succeeds("analyze", trace_folder, "--gpus", 4, "--deep")
    assert "headroom" in outcome.stdout
    assert "how much to profile" in outcome.stdout
    assert max(len(line.rstrip()) for line in outcome.stdout.splitlines()) <= 120


def test_routing_without_structure_is_not_worth_placing(tmp_path):
    import numpy as np

    from placer.trace import make_trace

    rng = np.random.default_rng(0)
    noise = rng.random((6000, 3, 16))
    drawn = make_trace(
        experts=np.argsort(noise, axis=2)[:, :, :2], num_experts=16, request=np.arange(6000) // 60
    )
    write_npz(drawn, tmp_path / "random.npz")
    found = succeeds("analyze", tmp_path / "random.npz", "--gpus", 4, "--json").document()
    assert found["verdict"]["can_help"] == "little"
    assert found["verdict"]["by"] == []


def test_traces_of_one_model_are_analyzed_together(trace_folder, tmp_path):
    other = tmp_path / "other.npz"
    write_npz(topic_trace(seed=9, num_requests=4), other)
    found = succeeds("analyze", trace_folder, other, "--gpus", 4, "--json").document()
    assert found["path"] == "2 traces"
    assert found["overall"]["num_tokens"] == 12 * 32 + 4 * 32


def test_impossible_requests_are_refused(trace_folder, tmp_path):
    one = tmp_path / "one.npz"
    write_npz(topic_trace(num_requests=1), one)
    assert "holds 1 request" in fails(2, tmp_path, "analyze", one, "--gpus", 4, "--deep")
    message = fails(2, tmp_path, "analyze", trace_folder, "--gpus", 3, "--deep")
    assert "--slots-per-rank 6" in message
    assert "cannot hold" in fails(
        3, tmp_path, "analyze", trace_folder, "--gpus", 4, "--slots-per-rank", 3, "--deep"
    )
    fails(5, tmp_path, "analyze", tmp_path / "none")
    wrong = fails(2, tmp_path, "analyze", trace_folder, "--gpus", "4,x")
    assert "--gpus '4,x' is not a list of whole numbers" in wrong


def test_ranks_are_listed_by_commas_or_one_by_one(trace_folder):
    found = [
        succeeds("analyze", trace_folder, *ranks, "--json").document()["overall"]["headroom"]
        for ranks in (("--gpus", "4,2"), ("--gpus", 4, "--gpus", 2))
    ]
    assert [entry["num_ranks"] for entry in found[0]] == [4, 2]
    assert found[0] == found[1]


def test_without_ranks_the_verdict_is_unknown():
    routing = {
        "clusters": [], "information_by_gap": [], "stability": None, "activation": [],
    }  # fmt: skip
    found = verdict({"overall": {"headroom": [], "num_experts": 2}, "routing": routing})
    assert found["can_help"] == "unknown"
    json.dumps(found)

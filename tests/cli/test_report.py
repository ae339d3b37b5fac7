"""`placer report`: one page that needs nothing else, and says what `placer evaluate` says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from placer.plan import read_plan
from placer.trace import make_trace, write_npz
from tests.conftest import topic_trace

from .running import fails, succeeds

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.text, self.tags = [], [], [], [], set()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value)
            assert not name.startswith("on")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def made(plan_path, trace_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    outcome = succeeds("report", plan_path, trace_folder, "-o", path, "--json")
    return path, outcome.document()


def test_the_page_is_sound_and_needs_nothing_else(made):
    html, page = read(made[0])
    assert html.startswith("<!DOCTYPE html>")
    assert page.tags & {"script", "link", "iframe", "object", "form"} == set()
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert re.findall(r"url\((?!#)", html) == []
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    inside = set(page.ids)
    used = [r[1:] for r in page.references if r.startswith("#")]
    used += re.findall(r"url\(#([^)]+)\)", html)
    assert used
    assert set(used) <= inside
    assert html.count("<svg") == html.count('role="img"') == 7
    assert "prefers-color-scheme: dark" in html
    assert "#010203" not in html  # every line and word takes the page's colour


def test_the_page_says_what_evaluate_says(made, plan_path, trace_folder):
    judged = succeeds("evaluate", plan_path, trace_folder, "--json").document()
    document = made[1]
    assert document["evaluation"] == judged
    text = " ".join(read(made[0])[1].text)
    entry = judged["metrics"]["messages_alltoall"]
    assert f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]" in text
    change = judged["change"]["contiguous"]["messages_alltoall"]["change"]
    assert f"{100 * change:+.1f} %" in text
    assert "held-out" in text
    for title in ("Figures", "Batches", "Workloads", "Where the plan comes from"):
        assert title in text


def test_layers_links_and_workloads_add_up(made):
    document = made[1]
    messages = document["evaluation"]["metrics"]["messages_alltoall"]["value"]
    plan = document["layers"]["plan"]
    assert sum(plan["messages"]) / 6 == pytest.approx(messages)
    assert sum(map(sum, plan["links"])) / 6 == pytest.approx(messages)
    imbalance = document["evaluation"]["metrics"]["imbalance"]["value"]
    assert sum(max(row) for row in plan["rank_load"]) / 6 == pytest.approx(imbalance, abs=1e-3)
    rows = document["labels"]
    assert {row["label"] for row in rows} == {"code", "prose", "maths"}
    weighed = sum(row["tokens"] * row["plan"]["messages_alltoall"]["value"] for row in rows)
    assert weighed / sum(row["tokens"] for row in rows) == pytest.approx(messages)
    assert sorted(document["example"]["order"]) == list(range(16))


def test_the_same_input_gives_the_same_page(made, plan_path, trace_folder, tmp_path):
    again = tmp_path / "again.html"
    outcome = succeeds("report", plan_path, trace_folder, "-o", again)
    assert again.read_bytes() == made[0].read_bytes()
    assert outcome.stdout.startswith("written: ")


def test_other_baselines_and_in_sample_figures_are_named(plan_path, trace_folder, tmp_path):
    path = tmp_path / "report.html"
    succeeds(
        "report", plan_path, trace_folder, "--baseline", "contiguous", "--baseline", plan_path,
        "--all-requests", "-o", path,
    )  # fmt: skip
    html, page = read(path)
    assert "in-sample" in " ".join(page.text)
    assert 'class="warning"' in html
    assert str(plan_path) in " ".join(page.text)


def test_a_plan_with_nodes_replicas_and_coherent_dispatch(decode_plan_path, trace_folder, tmp_path):
    path = tmp_path / "report.html"
    document = succeeds("report", decode_plan_path, trace_folder, "-o", path, "--json").document()
    text = " ".join(read(path)[1].text)
    assert "2 nodes" in text
    assert "node messages, coherent" in text
    messages = document["evaluation"]["metrics"]["messages_coherent"]["value"]
    assert sum(document["layers"]["plan"]["messages"]) / 6 == pytest.approx(messages, rel=0.02)


def test_words_of_users_cannot_become_elements(tmp_path):
    trace = topic_trace(num_layers=2)
    evil = "<script>alert(1)</script> $x_1$ & co"
    labels = {i: (evil, "other", "third")[i % 3] for i in range(12)}
    named = make_trace(
        experts=trace.experts, num_experts=16, request=trace.request, labels=labels,
        model=type(trace.model)(name="<b>model</b>"),
    )  # fmt: skip
    write_npz(named, tmp_path / "a&b.npz")
    plan, path = tmp_path / "plan.json", tmp_path / "report.html"
    succeeds("solve", tmp_path / "a&b.npz", "--gpus", 4, "-o", plan)
    succeeds("report", plan, tmp_path / "a&b.npz", "-o", path)
    _, page = read(path)
    assert "script" not in page.tags
    assert "b" in page.tags  # of the tiles, not of the name
    assert "<b>model</b>" in " ".join(page.text)
    assert evil in " ".join(page.text)


def test_a_plan_that_says_nothing_of_itself(made, plan_path, trace_folder, tmp_path):
    document = json.loads(plan_path.read_text())
    for key in ("prediction", "certificate", "provenance", "timings", "model"):
        del document[key]
    bare, path = tmp_path / "bare.json", tmp_path / "report.html"
    bare.write_text(json.dumps(document))
    succeeds("report", bare, trace_folder, "-o", path)
    text = " ".join(read(path)[1].text)
    assert "The plan does not say." in text
    assert "unseen" in text


def test_a_small_trace_of_one_layer_and_request(tmp_path):
    trace = topic_trace(num_requests=1, num_layers=1, labels=False)
    write_npz(trace, tmp_path / "one.npz")
    plan, path = tmp_path / "plan.json", tmp_path / "report.html"
    succeeds("solve", tmp_path / "one.npz", "--gpus", 2, "--in-sample", "-o", plan)
    succeeds("report", plan, tmp_path / "one.npz", "-o", path)
    assert "in-sample" in " ".join(read(path)[1].text)


def test_failures_leave_nothing_behind(made, plan_path, trace_folder, tmp_path):
    path = tmp_path / "report.html"
    fails(5, tmp_path, "report", tmp_path / "none.json", trace_folder, "-o", path)
    fails(5, tmp_path, "report", plan_path, tmp_path / "none", "-o", path)
    other = tmp_path / "other.npz"
    write_npz(topic_trace(num_layers=3), other)
    message = fails(2, tmp_path, "report", plan_path, other, "-o", path)
    assert "of its own model" in message
    fails(2, tmp_path, "report", plan_path, trace_folder, "-o", tmp_path / "no" / "r.html")
    fails(2, tmp_path, "report", plan_path, trace_folder, "--baseline", "lpt", "-o", path)
    path.write_text("mine")
    fails(2, tmp_path, "report", plan_path, trace_folder, "-o", path)
    succeeds("report", plan_path, trace_folder, "-o", path, "--force")
    assert path.read_text().startswith("<!DOCTYPE")


def test_a_plan_of_rounds_can_be_shown(tmp_path):
    trace = topic_trace(num_layers=6)
    chained = make_trace(
        experts=trace.experts, num_experts=16, request=trace.request, layer_ids=[1, 1, 2, 2, 3, 3]
    )
    write_npz(chained, tmp_path / "chained.npz")
    plan = tmp_path / "plan.json"
    succeeds("solve", tmp_path / "chained.npz", "--gpus", 4, "-o", plan)
    assert read_plan(plan).layer_ids == (1, 2, 3)
    document = succeeds(
        "report", plan, tmp_path / "chained.npz", "-o", tmp_path / "report.html", "--json"
    ).document()
    assert len(document["layers"]["plan"]["messages"]) == 6


@pytest.mark.parametrize("used", [True, False])
def test_one_rank_and_a_trace_without_load_can_be_shown_too(used, tmp_path):
    experts = np.zeros((8, 2, 2), np.int16) + np.arange(2, dtype=np.int16)
    experts = experts if used else np.full_like(experts, -1)
    trace = make_trace(experts=experts, num_experts=4, request=np.arange(8) // 2)
    write_npz(trace, tmp_path / "t.npz")
    succeeds("solve", tmp_path / "t.npz", "--gpus", 1, "-o", tmp_path / "plan.json")
    succeeds("report", tmp_path / "plan.json", tmp_path / "t.npz", "-o", tmp_path / "r.html")
    assert "<svg" in (tmp_path / "r.html").read_text()
    succeeds("analyze", tmp_path / "t.npz", "--gpus", "1,2")
    succeeds("analyze", tmp_path / "t.npz", "--gpus", "2", "--deep")
    succeeds("compare", tmp_path / "t.npz", "--gpus", 2, "--solvers", "contiguous,random")
    succeeds("sweep", tmp_path / "t.npz", "--gpus", "1,2", "-o", tmp_path / "sweep", "--jobs", 1)

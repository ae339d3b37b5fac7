"""`placer evaluate`: honest about what a plan was fitted to, and right to the ninth digit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import topic_trace
from cost.reference import evaluate as reference

from placer.cost import METRICS
from placer.plan import read_plan
from placer.trace import open_trace, split_requests, write_npz

from .running import fails, succeeds


def edited(path, folder, **changes):
    """A copy of a plan file with some keys replaced."""
    document = json.loads(path.read_text()) | changes
    copy = folder / "edited.json"
    copy.write_text(json.dumps(document))
    return copy


def held_out_requests(source, plan):
    split = plan.provenance["split"]
    return split_requests(
        source.request_ids(),
        seed=split["seed"],
        holdout=split["holdout"],
        labels=source.request_labels(),
    )


def test_a_plan_is_judged_on_exactly_the_requests_that_it_was_not_fitted_to(
    trace, trace_folder, plan_path
):
    split = held_out_requests(open_trace(trace_folder), read_plan(plan_path))
    assert set(split.fit) & set(split.held_out) == set()
    assert set(split.fit) | set(split.held_out) == set(trace.request)
    document = succeeds("evaluate", plan_path, trace_folder, "--json").document()
    assert document["scope"] == "held-out"
    assert document["requests"] == split.held_out.size
    part = trace.select(np.isin(trace.request, split.held_out))
    assert document["tokens"] == part.num_tokens
    expected = reference(part, read_plan(plan_path).placement)
    assert document["metrics"]["span"]["value"] == pytest.approx(expected["span"], rel=1e-9)


def test_the_prediction_of_a_plan_is_what_evaluate_prints(trace_folder, plan_path):
    document = succeeds("evaluate", plan_path, trace_folder, "--json").document()
    assert document == json.loads(plan_path.read_text())["prediction"]


def test_the_prediction_holds_for_a_phase_spare_slots_and_nodes_too(trace_folder, decode_plan_path):
    document = succeeds("evaluate", decode_plan_path, trace_folder, "--json").document()
    assert document == json.loads(decode_plan_path.read_text())["prediction"]
    assert document["tokens"] == 6 * 12


def test_a_plan_fitted_to_two_traces_is_judged_on_the_held_out_requests_of_each(
    trace_folder, tmp_path
):
    other, plan = tmp_path / "other.npz", tmp_path / "plan.json"
    write_npz(topic_trace(seed=1), other)
    succeeds("solve", trace_folder, other, "--gpus", 4, "-o", plan)
    documents = [
        succeeds("evaluate", plan, path, "--json").document() for path in (trace_folder, other)
    ]
    assert [d["scope"] for d in documents] == ["held-out", "held-out"]
    prediction = json.loads(plan.read_text())["prediction"]
    assert sum(d["tokens"] for d in documents) == prediction["tokens"]


@pytest.mark.parametrize("policy", ["local", "round_robin"])
@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
@pytest.mark.parametrize("which", ["plan", "decode_plan"])
def test_every_figure_agrees_with_an_independent_implementation(
    trace, trace_npz, plan_path, decode_plan_path, tmp_path, which, dispatch, policy
):
    source = plan_path if which == "plan" else decode_plan_path
    plan = edited(source, tmp_path, provenance={})  # never saw the trace: all tokens count
    document = succeeds(
        "evaluate", plan, trace_npz, "--dispatch", dispatch, "--replica-policy", policy,
        "--resamples", 0, "--batch-tokens", 50, "--json",
    ).document()  # fmt: skip
    assert document["scope"] == "unseen"
    expected = reference(
        trace, read_plan(plan).placement, dispatch=dispatch, policy=policy, batch_tokens=50
    )
    found = {name: entry["value"] for name, entry in document["metrics"].items()}
    assert set(found) == {info.name for info in METRICS}
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
        assert document["metrics"][name]["low"] is None


def test_figures_agree_without_recorded_steps_and_with_weights_and_homes(tmp_path):
    traced = topic_trace(seed=4, weights=True, num_requests=6)
    traced = replace(traced, step=None, home=(traced.request * 7 % 4).astype(np.int64))
    path, plan = tmp_path / "trace.npz", tmp_path / "plan.json"
    write_npz(traced, path)
    succeeds("solve", path, "--gpus", 4, "--slots-per-rank", 5, "--dispatch", "coherent",
             "--max-imbalance", "none", "-o", plan)  # fmt: skip
    document = succeeds(
        "evaluate", edited(plan, tmp_path, provenance={}), path, "--batch-tokens", 30, "--json"
    ).document()
    expected = reference(traced, read_plan(plan).placement, dispatch="coherent", batch_tokens=30)
    assert document["home"] == "recorded"
    for name, entry in document["metrics"].items():
        assert entry["value"] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_intervals_hold_their_value(trace_folder, plan_path):
    document = succeeds("evaluate", plan_path, trace_folder, "--json").document()
    for entry in document["metrics"].values():
        if entry["low"] is not None:
            assert entry["low"] - 1e-12 <= entry["value"] <= entry["high"] + 1e-12


def test_all_requests_are_labelled_in_sample(trace_folder, plan_path):
    outcome = succeeds("evaluate", plan_path, trace_folder, "--all-requests")
    assert "IN-SAMPLE" in outcome.stdout
    document = succeeds("evaluate", plan_path, trace_folder, "--all-requests", "--json").document()
    assert (document["scope"], document["requests"]) == ("in-sample", 12)


def test_all_requests_keep_to_the_phase_that_the_plan_was_fitted_to(trace_folder, decode_plan_path):
    document = succeeds(
        "evaluate", decode_plan_path, trace_folder, "--all-requests", "--json"
    ).document()
    assert document["tokens"] == 12 * 12


def test_a_plan_of_one_phase_can_be_judged_on_the_other(trace_folder, decode_plan_path):
    document = succeeds(
        "evaluate", decode_plan_path, trace_folder, "--phase", "prefill", "--json"
    ).document()
    assert document["scope"] == "held-out"
    assert (document["requests"], document["tokens"]) == (6, 6 * 20)


def test_a_trace_that_the_plan_never_saw_counts_as_a_whole(plan_path, tmp_path):
    path = tmp_path / "new.npz"
    write_npz(topic_trace(seed=9), path)
    document = succeeds("evaluate", plan_path, path, "--json").document()
    assert (document["scope"], document["requests"]) == ("unseen", 12)


def test_changed_labels_cannot_pass_fitted_requests_off_as_held_out(trace, plan_path, tmp_path):
    path = tmp_path / "relabelled.npz"
    write_npz(replace(trace, labels={i: "abcdefghijkl"[i] for i in range(12)}), path)
    error = fails(2, tmp_path, "evaluate", plan_path, path)
    assert "labels" in error
    assert "--all-requests" in error
    document = succeeds("evaluate", plan_path, path, "--all-requests", "--json").document()
    assert document["scope"] == "in-sample"


def test_a_plan_equal_to_its_baseline_changes_nothing(trace_folder, plan_path):
    document = succeeds(
        "evaluate", plan_path, trace_folder, "--baseline", plan_path, "--baseline", "contiguous",
        "--json",
    ).document()  # fmt: skip
    same = document["change"][str(plan_path)]
    assert all(entry["change"] in (0.0, None) for entry in same.values())
    assert document["change"]["contiguous"]["messages_alltoall"]["change"] < 0


def test_the_table_shows_both_and_all_figures_on_demand(trace_folder, decode_plan_path):
    short = succeeds("evaluate", decode_plan_path, trace_folder).stdout
    assert "contiguous" in short
    assert "node span" in short
    assert "imbalance, mean over batches" not in short
    full = succeeds("evaluate", decode_plan_path, trace_folder, "--all").stdout
    assert "imbalance, mean over batches" in full
    assert "_" not in full


def test_two_runs_print_the_same(trace_folder, plan_path):
    runs = [succeeds("evaluate", plan_path, trace_folder, "--json").stdout for _ in range(2)]
    assert runs[0] == runs[1]


def test_an_unknown_baseline_is_refused(trace_folder, plan_path, tmp_path):
    error = fails(2, tmp_path, "evaluate", plan_path, trace_folder, "--baseline", "best-guess")
    assert "best-guess" in error
    assert "contiguous" in error


def test_a_plan_of_another_model_is_refused(plan_path, tmp_path):
    for number, traced in enumerate(
        [topic_trace(num_layers=4), topic_trace(num_experts=32), topic_trace(layer_ids=range(6))]
    ):
        path = tmp_path / f"{number}.npz"
        write_npz(traced, path)
        error = fails(2, tmp_path, "evaluate", plan_path, path)
        assert "the plan 6 x 16 (layer ids 1..6)" in error


def test_a_baseline_of_another_model_is_refused(trace_folder, plan_path, tmp_path):
    other, plan = tmp_path / "other.npz", tmp_path / "other.json"
    write_npz(topic_trace(num_layers=4), other)
    succeeds("solve", other, "--gpus", 4, "--solver", "contiguous", "-o", plan)
    error = fails(2, tmp_path, "evaluate", plan_path, trace_folder, "--baseline", plan)
    assert "4 layers x 16 experts" in error


def test_an_empty_phase_is_an_error(trace, plan_path, tmp_path):
    path = tmp_path / "prefill.npz"
    write_npz(trace.select(trace.phase == 0), path)
    assert "no tokens of phase decode" in fails(
        2, tmp_path, "evaluate", plan_path, path, "--phase", "decode"
    )


def without_expert_5(document):
    table = document["physical_to_logical"]
    table[2] = [-1 if expert == 5 else expert for expert in table[2]]


def expert_twice_on_a_rank(document):
    document["slots_per_rank"] = 5
    table = np.array(document["physical_to_logical"]).reshape(6, 4, 4)
    document["physical_to_logical"] = (
        np.concatenate([table, table[:, :, :1]], axis=2).reshape(6, 20).tolist()
    )


BROKEN = {
    "newer version": (lambda d: d.update(schema_version=2), ["schema_version 2", "up to 1"]),
    "another format": (lambda d: d.update(format="placer.trace"), ["placer.trace"]),
    "an expert missing": (without_expert_5, ["layer 2: no slot holds expert 5"]),
    "an expert twice": (expert_twice_on_a_rank, ["holds an expert twice"]),
    "an id out of range": (
        lambda d: d["physical_to_logical"][0].__setitem__(0, 99),
        ["expert ids must lie in -1..15"],
    ),
    "a row short": (lambda d: d["physical_to_logical"][3].pop(), ["row 3", "15 slots", "4 ranks"]),
    "a row missing": (lambda d: d["physical_to_logical"].pop(), ["5 rows", "expected 6"]),
    "no placement": (lambda d: d.pop("physical_to_logical"), ["physical_to_logical"]),
    "text for a number": (lambda d: d.update(num_ranks="4"), ["num_ranks", "'4'"]),
    "a number out of all reason": (lambda d: d.update(num_experts=10**30), ["num_experts"]),
    "nodes that do not divide": (lambda d: d.update(ranks_per_node=3), ["3 ranks per node"]),
    "layers out of order": (lambda d: d["layer_ids"].reverse(), ["layer_ids must increase"]),
    "a negative layer": (lambda d: d["layer_ids"].__setitem__(0, -1), ["layer_ids.0"]),
    "an unknown dispatch": (lambda d: d.update(dispatch="pigeon"), ["dispatch", "pigeon"]),
    "a split without its seed": (
        lambda d: d["provenance"]["split"].pop("seed"),
        ["provenance.split.seed"],
    ),
    "inputs of another shape": (
        lambda d: d["provenance"].update(inputs=[1]),
        ["provenance.inputs"],
    ),
    "a foreign prediction": (lambda d: d.update(prediction={"x": 1}), ["prediction.format"]),
    "an unfinished certificate": (
        lambda d: d.update(certificate={"value": 1.0}),
        ["certificate.objective"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_plan_is_refused_with_what_and_where(trace_folder, plan_path, tmp_path, what):
    damage, words = BROKEN[what]
    document = json.loads(plan_path.read_text())
    damage(document)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    for command in (["evaluate", path, trace_folder], ["inspect", path]):
        error = fails(5, tmp_path, *command)
        assert str(path) in error
        for word in words:
            assert word in error


def test_a_truncated_plan_is_refused(trace_folder, plan_path, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan_path.read_text()[:-500])
    assert "truncated" in fails(5, tmp_path, "evaluate", path, trace_folder)


def test_a_plan_that_says_nothing_of_its_origin_is_judged_as_unseen(
    trace_folder, plan_path, tmp_path
):
    bare = edited(plan_path, tmp_path, prediction={}, certificate={}, provenance={}, timings={})
    document = succeeds("evaluate", bare, trace_folder, "--json").document()
    assert (document["scope"], document["requests"]) == ("unseen", 12)
    assert "6 layers x 16 experts" in succeeds("inspect", bare).stdout


@pytest.mark.parametrize("order", ["plan first", "trace first"])
def test_a_missing_file_is_named(trace_folder, plan_path, tmp_path, order):
    none = tmp_path / "none"
    arguments = [none, trace_folder] if order == "plan first" else [plan_path, none]
    error = fails(5, tmp_path, "evaluate", *arguments)
    assert f"{none} does not exist" in error


def test_a_cluster_adds_modelled_step_times(trace_folder, plan_path):
    options = ("--cluster", "h100-nvl8", "--resamples", 0)
    document = succeeds("evaluate", plan_path, trace_folder, *options, "--json").document()
    times = document["step_time"]
    assert times["cluster"] == "h100-nvl8"
    for name in ("plan", "contiguous"):
        assert times[name]["modelled"] is True
        assert 0 < times[name]["total_us_p50"] <= times[name]["total_us_p99"]
        shares = {k: v for k, v in times[name]["shares"].items() if k != "hidden"}
        assert sum(shares.values()) == pytest.approx(1)
    prediction = json.loads(plan_path.read_text())["prediction"]
    assert document | {"step_time": None} == prediction | {
        "step_time": None, "metrics": document["metrics"], "baselines": document["baselines"],
        "change": document["change"],
    }  # fmt: skip
    options += ("--all-requests", "--tokens-per-rank", 2, "--micro-batches", 2)
    text = succeeds("evaluate", plan_path, trace_folder, *options).stdout
    assert "2 tokens per rank" in text
    assert "hidden" in text


def test_options_of_the_step_time_need_a_cluster(trace_folder, plan_path, tmp_path):
    base = ("evaluate", plan_path, trace_folder)
    for options in (("--micro-batches", 2), ("--tokens-per-rank", 2), ("--model", "deepseek-v3")):
        assert "needs a cluster" in fails(2, tmp_path, *base, *options)
    error = fails(2, tmp_path, *base, "--cluster", "h100-nvl8", "--model", "deepseek-v3")
    assert "58 MoE layers of 256 experts" in error


def test_a_step_time_without_the_size_of_keys_and_values_names_the_option(plan_path, trace_folder):
    asked = ("evaluate", plan_path, trace_folder, "--dispatch", "coherent", "--cluster")
    shown = succeeds(*asked, "h100-nvl8").stdout
    assert "unknown: kv_bytes_per_token (--model says it)" in shown

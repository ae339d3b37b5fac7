"""`placer solve`: what it writes, what it promises, what it refuses."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import topic_trace

import solvers
from placer.plan import read_plan
from placer.trace import ModelDims, open_trace, write_npz
from solvers.clock import COMPILE_CLOCK

from .running import fails, run, succeeds, usage_error

GPT_OSS = Path(__file__).parents[3] / "shared" / "traces" / "gpt_oss_20b_decode.npz"
SMALL_CLUSTER = """
format = "placer.cluster"
schema_version = 1
num_nodes = 1
ranks_per_node = 8
intra_node_gbps = 100.0
intra_node_latency_us = 5.0
inter_node_gbps = 25.0
inter_node_latency_us = 15.0
memory_bytes = {memory}
hbm_gbps = 1000.0
flops = 1e14
"""


def saved(tmp_path, trace, name="made.npz"):
    path = tmp_path / name
    write_npz(trace, path)
    return path


def test_a_plan_is_written_and_shown(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    outcome = succeeds("solve", trace_folder, "--gpus", 4, "-o", path)
    assert "held-out" in outcome.stdout
    assert "messages, alltoall" in outcome.stdout
    assert outcome.stderr == ""
    document = json.loads(path.read_text())
    assert document["format"] == "placer.plan"
    assert document["schema_version"] == 1
    assert (document["num_experts"], document["num_ranks"], document["slots_per_rank"]) == (
        16,
        4,
        4,
    )
    assert document["layer_ids"] == [1, 2, 3, 4, 5, 6]
    assert document["model"]["hidden_size"] == 64
    assert read_plan(path).placement.problems() == []


def test_json_is_the_plan_file_and_its_path(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    document = succeeds("solve", trace_folder, "--gpus", 4, "-o", path, "--json").document()
    assert document.pop("path") == str(path)
    assert document == json.loads(path.read_text())


def test_a_plan_keeps_the_default_cap_and_beats_contiguous_on_held_out_requests(plan_path):
    document = json.loads(plan_path.read_text())
    assert document["provenance"]["settings"]["max_imbalance"] == 1.10
    assert document["certificate"]["parts"]["imbalance"] <= 1.10 * (1 + 1e-9)
    assert document["certificate"]["status"] == "feasible"
    change = document["prediction"]["change"]["contiguous"]["messages_alltoall"]
    assert change["change"] < -0.05
    assert change["change_high"] < 0


def test_without_a_cap_the_plan_sends_fewer_messages(trace_folder, plan_path, tmp_path):
    path = tmp_path / "free.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--max-imbalance", "none", "-o", path)
    free, capped = json.loads(path.read_text()), json.loads(plan_path.read_text())
    assert free["provenance"]["settings"]["max_imbalance"] is None
    assert free["certificate"]["value"] < capped["certificate"]["value"]


def test_the_same_seed_gives_the_same_bytes_without_timings(trace_folder, tmp_path):
    documents = []
    for name in ("a.json", "b.json"):
        path = tmp_path / name
        succeeds("solve", trace_folder, "--gpus", 4, "--seed", 5, "-o", path)
        document = json.loads(path.read_text())
        timings = set(document.pop("timings")) - {"compile_s"}
        assert timings == {"solve_s", "certify_s", "total_s"}
        documents.append(json.dumps(document))
    assert documents[0] == documents[1]


def test_compiling_is_told_apart_from_solving_and_changes_only_timings(
    trace_folder, tmp_path, monkeypatch
):
    real, compiled_s = time.monotonic, [0.0]
    entry = solvers.get("contiguous")

    def slow(*arguments):
        COMPILE_CLOCK.begin()
        compiled_s[0] += 30.0
        COMPILE_CLOCK.end()
        return entry.function(*arguments)

    def solved(name):
        arguments = ("--gpus", 4, "--solver", "contiguous", "-o", tmp_path / name)
        printed = succeeds("solve", trace_folder, *arguments).stdout
        document = json.loads((tmp_path / name).read_text())
        return printed, document.pop("timings"), document

    solved("warm.json")
    printed, timings, document = solved("quick.json")
    assert "compile_s" not in timings
    assert "for compiling" not in printed
    monkeypatch.setattr("time.monotonic", lambda: real() + compiled_s[0])
    monkeypatch.setattr("solvers.solving.get", lambda _: replace(entry, function=slow))
    told, slow_timings, same = solved("slow.json")
    assert slow_timings["compile_s"] == pytest.approx(30.0, abs=1.0)
    assert slow_timings["solve_s"] < 15.0
    assert "30 s more for compiling, once per machine" in " ".join(told.split())
    assert same == document
    compared = ("compare", trace_folder, "--gpus", 4, "--solvers", "contiguous")
    assert "30 s more for compiling" in " ".join(succeeds(*compared).stdout.split())
    monkeypatch.undo()
    assert "for compiling" not in succeeds(*compared).stdout


def test_another_seed_holds_out_other_requests(trace_folder, plan_path, tmp_path):
    path = tmp_path / "other.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--seed", 1, "-o", path)
    first, second = (json.loads(p.read_text())["provenance"]["inputs"] for p in (plan_path, path))
    assert first[0]["fingerprint"] == second[0]["fingerprint"]
    assert first[0]["fit_requests"] != second[0]["fit_requests"]


def test_the_folder_and_the_npz_of_one_trace_give_the_same_placement(
    trace_npz, plan_path, tmp_path
):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_npz, "--gpus", 4, "-o", path)
    assert (read_plan(path).placement.physical_to_logical
            == read_plan(plan_path).placement.physical_to_logical).all()  # fmt: skip


@pytest.mark.parametrize("solver", ["contiguous", "round_robin", "random", "eplb", "local_search"])
def test_a_solver_can_be_named(trace_folder, tmp_path, solver):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--solver", solver, "-o", path)
    assert json.loads(path.read_text())["provenance"]["solver"] == solver


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent", "allgather"])
def test_every_dispatch_model_can_be_asked_for(trace_folder, tmp_path, dispatch):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--dispatch", dispatch, "-o", path)
    document = json.loads(path.read_text())
    assert document["dispatch"] == document["prediction"]["dispatch"] == dispatch


def test_nodes_divide_the_ranks(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 8, "--nodes", 2, "-o", path)
    document = json.loads(path.read_text())
    assert document["ranks_per_node"] == 4
    assert 1 < document["prediction"]["metrics"]["node_span"]["value"] <= 2


def test_several_traces_are_fitted_together(trace_folder, tmp_path):
    other = saved(tmp_path, topic_trace(seed=1))
    path = tmp_path / "plan.json"
    succeeds("solve", trace_folder, other, "--gpus", 4, "-o", path)
    document = json.loads(path.read_text())
    assert len(document["provenance"]["inputs"]) == 2
    assert document["prediction"]["requests"] == 12


def test_in_sample_is_labelled(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    outcome = succeeds("solve", trace_folder, "--gpus", 4, "--in-sample", "-o", path)
    assert "IN-SAMPLE" in outcome.stdout
    document = json.loads(path.read_text())
    assert document["prediction"]["scope"] == "in-sample"
    assert document["prediction"]["requests"] == 12


def test_unequal_division_works_through_empty_and_redundant_slots(tmp_path):
    """256 experts on 144 ranks."""
    wide = saved(
        tmp_path,
        topic_trace(num_requests=4, prefill=4, decode=2, num_layers=2, num_experts=256, top_k=8),
    )
    error = fails(2, tmp_path, "solve", wide, "--gpus", 144, "-o", tmp_path / "plan.json")
    assert "144 ranks do not divide 256 experts" in error
    assert "--slots-per-rank 2 leaves 32 slots" in error
    path = tmp_path / "plan.json"
    succeeds("solve", wide, "--gpus", 144, "--nodes", 2, "--slots-per-rank", 2,
             "--max-imbalance", "none", "-o", path)  # fmt: skip
    placement = read_plan(path).placement
    assert placement.physical_to_logical.shape == (2, 288)
    assert placement.ranks_per_node == 72
    assert placement.problems() == []


def test_spare_slots_without_replicas_stay_empty(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 3, "--slots-per-rank", 6, "--solver", "contiguous",
             "-o", path)  # fmt: skip
    table = read_plan(path).placement.physical_to_logical
    assert (np.sort(table, axis=1)[:, :2] == -1).all()


def test_latency_needs_a_cluster_and_gets_a_step_time_with_one(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    base = ("solve", trace_folder, "--gpus", 4, "--objective", "latency", "-o", path)
    assert "--cluster" in fails(2, tmp_path, *base)
    outcome = succeeds(*base, "--cluster", "h100-nvl8")
    assert "modelled step time" in outcome.stdout
    document = json.loads(path.read_text())
    assert document["prediction"]["step_time"]["plan"]["total_us"] > 0
    assert read_plan(path).dispatch == "alltoall"


def test_latency_names_what_the_trace_lacks(trace, tmp_path):
    bare = saved(tmp_path, replace(trace, model=ModelDims()))
    error = fails(2, tmp_path, "solve", bare, "--gpus", 4, "--objective", "latency", "--cluster",
                  "h100-nvl8", "-o", tmp_path / "plan.json")  # fmt: skip
    assert "hidden_size" in error


def test_more_slots_than_memory_is_infeasible(trace_folder, tmp_path):
    cluster = tmp_path / "small.toml"
    cluster.write_text(SMALL_CLUSTER.format(memory=30 * 10**6))  # 30 MB: 5 slots of 6 layers x 1 MB
    path = tmp_path / "plan.json"
    base = ("solve", trace_folder, "--gpus", 4, "--cluster", cluster, "-o", path)
    error = fails(3, tmp_path, *base, "--slots-per-rank", 6)
    assert "at most 5 slots per rank fit" in error
    succeeds(*base, "--slots-per-rank", 5, "--max-imbalance", "none")


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--gpus", 3], 2, ["3 ranks do not divide 16 experts", "--slots-per-rank 6"]),
        (["--gpus", 32], 2, ["32 ranks are more than the 16 experts", "--slots-per-rank 1"]),
        (["--gpus", 4, "--slots-per-rank", 3], 3, ["cannot hold 16 experts", "--slots-per-rank 4"]),
        (["--gpus", 4, "--nodes", 3], 2, ["3 nodes do not divide 4 GPUs"]),
        (["--gpus", 4, "--nodes", 8], 2, ["8 nodes do not divide 4 GPUs"]),
        (["--gpus", 4, "--solver", "eplb", "--pin", "3@0"], 2, ["'eplb' does not know pinned"]),
        (
            ["--gpus", 4, "--solver", "moetuner:gurobi"],
            2,
            ["no back end 'gurobi'", "moetuner:scip"],
        ),
        (["--gpus", 4, "--solver", "magic"], 2, ["no solver is called 'magic'", "local_search"]),
        (["--gpus", 4, "--max-imbalance", "0.9"], 2, ["1 or more"]),
        (["--gpus", 4, "--max-imbalance", "nan"], 2, ["1 or more"]),
        (["--gpus", 4, "--max-imbalance", "low"], 2, ["not a number"]),
        (["--gpus", 4, "--max-imbalance", "1.0000001"], 3, ["imbalance at most", "--max-imb"]),
        (["--gpus", 4, "--solver", "contiguous", "--max-imbalance", "1.01"], 3, ["contiguous"]),
        (["--gpus", 4, "--solver", "local_serch"], 2, ["did you mean local_search?"]),
        (["--gpus", 4, "--holdout", "0"], 2, ["holdout", "--holdout 0.5"]),
        (["--gpus", 4, "--holdout", "1"], 2, ["holdout"]),
        (["--gpus", 4, "--holdout", "nan"], 2, ["holdout"]),
        (["--gpus", 4, "--cluster", "dgx-99"], 2, ["dgx-99", "h100-nvl8"]),
        (["--gpus", 4, "--cluster", "H100-nvl"], 2, ["did you mean h100-nvl8?"]),
        (["--gpus", 16, "--cluster", "h100-nvl8"], 2, ["has 8 ranks", "more nodes"]),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    trace_folder, tmp_path, options, exit_code, words
):
    error = fails(
        exit_code, tmp_path, "solve", trace_folder, *options, "-o", tmp_path / "plan.json"
    )
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--gpus", "0"],
        ["--gpus", "four"],
        ["--gpus", "4", "--slots-per-rank", "0"],
        ["--gpus", "4", "--time-limit", "-1"],
        ["--gpus", "4", "--time-limit", "nan"],
        ["--gpus", "4", "--node-weight", "nan"],
        ["--gpus", "4", "--node-weight", "-1"],
        ["--gpus", "4", "--phase", "warmup"],
        ["--gpus", "4", "--dispatch", "pigeon"],
        ["--gpus", "4", "--objective", "beauty"],
        ["--gpus", "4", "--seed", "-1"],
    ],
)
def test_options_out_of_range_are_refused_by_the_parser(trace_folder, tmp_path, options):
    usage_error(tmp_path, "solve", trace_folder, *options, "-o", tmp_path / "plan.json")


def test_an_existing_plan_is_kept_unless_forced(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("mine")
    base = ("solve", trace_folder, "--gpus", 4, "--solver", "contiguous", "-o", path)
    assert "--force" in fails(2, tmp_path, *base)
    succeeds(*base, "--force")
    assert read_plan(path).placement.num_ranks == 4


def test_an_output_that_cannot_be_written_is_refused_before_the_trace_is_read(tmp_path):
    missing = tmp_path / "no-trace"
    assert "mkdir -p" in fails(
        2, tmp_path, "solve", missing, "--gpus", 4, "-o", tmp_path / "none" / "plan.json"
    )
    fails(2, tmp_path, "solve", missing, "--gpus", 4, "-o", tmp_path, "--force")


def test_one_request_leaves_nothing_to_hold_out(trace, tmp_path):
    path = saved(tmp_path, trace.select(trace.request == 3))
    output = tmp_path / "plan.json"
    error = fails(2, tmp_path, "solve", path, "--gpus", 4, "-o", output)
    assert "1 request" in error
    assert "--in-sample" in error
    succeeds("solve", path, "--gpus", 4, "--in-sample", "-o", output, "--max-imbalance", "none")
    prediction = json.loads(output.read_text())["prediction"]
    assert prediction["metrics"]["span"]["low"] is None  # one request: no interval


def test_an_empty_phase_is_an_error(trace, tmp_path):
    path = saved(tmp_path, trace.select(trace.phase == 0))
    error = fails(
        2, tmp_path, "solve", path, "--gpus", 4, "--phase", "decode", "-o", tmp_path / "plan.json"
    )
    assert "no tokens of phase decode" in error
    assert "240 prefill" in error


def test_traces_of_two_models_are_refused(trace_folder, tmp_path):
    other = saved(tmp_path, topic_trace(num_layers=5))
    error = fails(
        2, tmp_path, "solve", trace_folder, other, "--gpus", 4, "-o", tmp_path / "plan.json"
    )
    assert "5 layers (ids 1..5) x 16 experts" in error


def test_the_same_trace_twice_is_refused(trace_folder, trace_npz, tmp_path):
    error = fails(
        2, tmp_path, "solve", trace_folder, trace_npz, "--gpus", 4, "-o", tmp_path / "p.json"
    )
    assert "same tokens" in error
    assert "each trace once" in error


def test_an_expired_limit_gives_a_plan_or_exit_code_4(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    outcome = run("solve", trace_folder, "--gpus", 4, "--max-imbalance", "1.01", "--time-limit",
                  0.1, "--solver", "local_search", "-o", path)  # fmt: skip
    assert outcome.exit_code in (0, 3, 4)
    assert path.exists() == (outcome.exit_code == 0)


def test_homes_of_more_ranks_than_there_are_fall_back_to_requests(trace, tmp_path):
    homes = (trace.request * 5 % 8).astype(np.int64)
    path = saved(tmp_path, replace(trace, home=homes))
    for gpus, home in ((4, "request"), (8, "recorded")):
        output = tmp_path / f"{gpus}.json"
        succeeds("solve", path, "--gpus", gpus, "-o", output, "--cluster", "h100-nvl8")
        document = json.loads(output.read_text())
        assert document["prediction"]["home"] == home


def test_warnings_go_to_stderr_and_brackets_print_as_they_are(trace, tmp_path):
    odd = tmp_path / "a[red]b.npz"
    write_npz(trace, odd)
    arrays = dict(np.load(odd))
    np.savez(odd, **arrays, surprise=np.zeros(1))
    output = tmp_path / "plan[bold].json"
    outcome = succeeds("solve", odd, "--gpus", 4, "--solver", "contiguous", "-o", output, "--json")
    assert "warning" in outcome.stderr
    assert "surprise" in outcome.stderr
    assert outcome.document()["path"] == str(output)
    assert "plan[bold].json" in succeeds("inspect", output).stdout
    assert open_trace(odd).num_tokens == trace.num_tokens


def one_layer(trace):
    return replace(trace, experts=trace.experts[:, :1], layer_ids=trace.layer_ids[:1])


def a_layer_without_tokens(trace):
    experts = trace.experts.copy()
    experts[:, 2] = -1
    return replace(trace, experts=experts)


def no_expert_at_all(trace):
    return replace(trace, experts=np.full_like(trace.experts, -1))


def tokens_with_fewer_experts(trace):
    experts = trace.experts.copy()
    experts[::3, :, 2:] = -1
    experts[::7, 1] = -1
    return replace(trace, experts=experts)


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
@pytest.mark.parametrize(
    "odd", [one_layer, a_layer_without_tokens, no_expert_at_all, tokens_with_fewer_experts]
)
def test_odd_but_sound_traces_go_all_the_way(trace, tmp_path, odd, dispatch):
    path, plan = saved(tmp_path, odd(trace)), tmp_path / "plan.json"
    succeeds("solve", path, "--gpus", 4, "--slots-per-rank", 5, "--dispatch", dispatch,
             "--max-imbalance", "none", "-o", plan)  # fmt: skip
    document = succeeds("evaluate", plan, path, "--all", "--json").document()
    assert document == json.loads(plan.read_text())["prediction"]
    succeeds("evaluate", plan, path, "--all")
    succeeds("analyze", path)
    succeeds("inspect", path)


def test_one_rank_sends_nothing_and_that_is_optimal(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 1, "-o", path)
    document = json.loads(path.read_text())
    assert document["certificate"]["value"] == 0.0
    assert document["certificate"]["status"] == "optimal"


def test_a_default_cap_that_cannot_be_kept_refuses_nothing(trace_folder, tmp_path):
    """An expert on every rank: nothing is left to balance. Nobody asked for the cap."""
    path = tmp_path / "plan.json"
    assert "could not be kept" in succeeds("solve", trace_folder, "--gpus", 16, "-o", path).stderr
    assert json.loads(path.read_text())["certificate"]["status"] == "feasible"
    other = tmp_path / "other.json"
    asked = ("solve", trace_folder, "--gpus", 16, "--max-imbalance", "1.10", "-o", other)
    assert "none lifts it" in fails(3, tmp_path, *asked)


@pytest.mark.slow
@pytest.mark.skipif(not GPT_OSS.exists(), reason="needs a trace of GPT-OSS-20B")
@pytest.mark.parametrize(("dispatch", "least_saving"), [("alltoall", 0.13), ("coherent", 0.2)])
def test_a_real_trace_gets_a_plan_that_saves_messages_on_held_out_requests(
    tmp_path, dispatch, least_saving
):
    path = tmp_path / "plan.json"
    succeeds("solve", GPT_OSS, "--gpus", 8, "--dispatch", dispatch, "-o", path)
    prediction = json.loads(path.read_text())["prediction"]
    change = prediction["change"]["contiguous"]
    assert change[f"messages_{dispatch}"]["change_high"] < -least_saving
    assert change["imbalance"]["change_high"] < 0


def test_a_named_model_must_be_the_traced_one(trace_folder, tmp_path):
    base = ("solve", trace_folder, "--gpus", 4, "-o", tmp_path / "plan.json")
    error = fails(2, tmp_path, *base, "--cluster", "h100-nvl8", "--model", "mixtral-8x7b")
    assert "mixtral-8x7b has 32 MoE layers of 8 experts, the trace" in error
    assert "needs to know the model" in fails(2, tmp_path, *base, "--kv-tokens", 5)

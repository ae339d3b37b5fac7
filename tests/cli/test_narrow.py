"""What commands show on a terminal of 80 columns: all that they show on a wide one."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
from rich.console import Console

from placer.report.analysis import analysis_tables
from placer.report.benching import bench_lines
from placer.report.certificates import certificate_table
from placer.report.plans import plan_summary
from placer.report.studies import deep_tables
from placer.report.sweep import sweep_table
from placer.report.tables import comparison_table, evaluation_table
from placer.report.timing import timing_table

from .running import succeeds

FIGURE = re.compile(r"[-+]?\d[\d,.]*\d|\d")


def shown(lines, width: int) -> str:
    file = io.StringIO()
    for line in lines:
        Console(file=file, width=width, highlight=False).print(line)
    return file.getvalue()


def lost(render) -> Counter[str]:
    """Figures that a terminal of 80 columns shows less often than a wide one."""
    narrow = shown(render(), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    return Counter(FIGURE.findall(shown(render(), 400))) - Counter(FIGURE.findall(narrow))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Short relative paths: a long one is split."""
    monkeypatch.chdir(tmp_path)


def test_compare(trace_folder):
    solvers = "contiguous,random,eplb,tensorrt_llm_cooccurrence"
    document = succeeds(
        "compare", trace_folder, "--gpus", 4, "--nodes", 2, "--solvers", solvers, "--json"
    ).document()
    assert not lost(lambda: comparison_table(document))


def test_evaluate(plan_path, trace_folder, here):
    (plan := plan_path.with_name("p.json")).write_bytes(plan_path.read_bytes())
    document = succeeds(
        "evaluate", plan, trace_folder, "--baseline", "contiguous", "--baseline", plan,
        "--cluster", "h100-nvl8", "--json",
    ).document()  # fmt: skip
    document["baselines"]["p.json"] = document["baselines"].pop(str(plan))
    document["change"]["p.json"] = document["change"].pop(str(plan))
    assert not lost(lambda: evaluation_table(document, show_all=True))
    assert not lost(lambda: timing_table(document["step_time"]))


def test_solve_and_certify(trace_folder, here):
    succeeds(
        "solve", trace_folder, "--gpus", 4, "--robust", "worst", "--certify", 1, "-o", "p.json"
    )
    plan = succeeds("inspect", "p.json", "--json").document()
    assert len(plan["certificate"]["bounds"]) > 3
    assert not lost(lambda: plan_summary(plan | {"path": "p.json"}))
    proven = succeeds("certify", "p.json", trace_folder, "--seconds", 1, "--json").document()
    assert not lost(lambda: certificate_table(proven | {"trace": "trace"}))


def test_analyze(trace_folder):
    document = succeeds("analyze", trace_folder, "--gpus", 4, "--deep", "--json").document()
    assert not lost(lambda: analysis_tables(document | {"path": "trace"}))
    assert not lost(lambda: deep_tables(document["deep"]))


def test_sweep(trace_folder, here):
    document = succeeds(
        "sweep", trace_folder, "--gpus", "2,4", "--dispatch", "alltoall,coherent", "--cluster",
        "h100-nvl8,local-cpu", "--solver", "eplb", "-o", "sweep", "--json",
    ).document()  # fmt: skip
    assert not lost(lambda: sweep_table(document))


def bench_document(repeats: int):
    """What a bench of two placements gives, of figures that are easy to tell apart."""
    links = {"same_rank": 31_938, "same_node": 456_916, "other_node": 123_456}
    parts = ("dispatch", "compute", "combine", "context")
    seconds = {part: 1.064 + number for number, part in enumerate(parts)}
    arm = {
        "dispatch": "alltoall-by-node",
        "measured": {
            "tokens_per_second": 36.34,
            "tokens_per_second_range": [35.01, 37.02],
            "prefill_seconds": 3.602,
            "decode_seconds": 0.836,
            "wall_seconds": 4.403,
            "seconds": seconds | {"rest": 0.809},
            "seconds_by_layer": {part: [0.111, 0.222] for part in parts[:3]},
            "messages": links,
            "hidden_bytes": {link: 512 * count for link, count in links.items()},
            "kv_bytes": links,
            "imbalance": 1.516,
        },
        "predicted": {"seconds": {part: value * 1.03 for part, value in seconds.items()}},
        "error": dict.fromkeys((*parts, "modelled", "wall"), 0.031),
        "exact": {"messages": True},
        "same_tokens_as_plan": True,
    }
    factor = {"measured": 1.693, "measured_range": [1.501, 1.802], "predicted": 1.655,
              "error": -0.022}  # fmt: skip
    against = {"plan_against_it": factor | {"by_phase": {"prefill": factor, "decode": factor}}}
    return {
        "plan": "p.json", "model": "model", "num_ranks": 8, "ranks_per_node": 4, "requests": 80,
        "prompt_tokens": 10_411, "max_new_tokens": 2, "repeats": repeats, "warm_ups": 1,
        "cluster": "here", "plan_prediction": None,
        "arms": {"plan (alltoall-by-node)": arm, "contiguous (alltoall-by-node)": arm | against},
    }  # fmt: skip


def test_bench():
    document = bench_document(repeats=5)
    assert not lost(lambda: bench_lines(document))
    text = shown(bench_lines(document), 400)
    assert "5 repeats in turn after 1 warm-up" in text
    assert "1.501–1.802" in text


def test_a_bench_of_one_repeat_shows_no_range():
    text = shown(bench_lines(bench_document(repeats=1)), 400)
    assert "1 repeat in turn" in text
    assert "36.34" in text
    assert "median" not in text
    assert "range" not in text
    assert "35.01" not in text
    assert "1.501" not in text

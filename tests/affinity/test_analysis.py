"""One pass over a trace gives all its parts, as JSON; and what the real trace is known to show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import Affinity, analyse, count, fold_of, held_out_information, summary
from placer.trace import MemorySource, open_trace

from .reference import assert_same, random_trace

REAL_TRACE = Path(__file__).parents[3] / "shared" / "traces" / "gpt_oss_20b_decode.npz"


def labelled_trace(num_tokens=240):
    rng = np.random.default_rng(2)
    request = np.arange(num_tokens) // 8
    return random_trace(
        num_tokens=num_tokens,
        variable_k=True,
        request=request,
        phase=rng.integers(0, 2, num_tokens),
        labels={r: ("chat", "code")[r % 2] for r in range(0, 20)},
    )


def test_parts_are_counted_in_one_pass():
    trace = labelled_trace()
    chunks = (trace.select(np.arange(240) // 50 == i) for i in range(5))
    seen = []
    found = analyse(chunks, progress=seen.append)
    assert sum(seen) == 240
    assert_same(found.overall, count(trace))
    assert list(found.phases) == ["decode", "prefill"]
    for number, name in enumerate(("prefill", "decode")):
        assert_same(found.phases[name], count(trace.select(trace.phase == number)))
    assert list(found.labels) == ["", "chat", "code"]
    code = np.isin(trace.request, np.arange(1, 20, 2))
    np.testing.assert_array_equal(found.labels["code"].load, count(trace.select(code)).load)
    lower, higher = found.request_halves
    assert lower.num_tokens == higher.num_tokens == 120
    np.testing.assert_array_equal(lower.load, count(trace.select(trace.request < 15)).load)


def test_held_out_information_comes_from_halves_of_the_requests():
    trace = labelled_trace()
    fold = fold_of(trace)[1]
    first, second = count(trace.select(fold == 0)), count(trace.select(fold == 1))
    assert 0.3 < first.num_tokens / 240 < 0.7
    assert len({(r, f) for r, f in zip(trace.request.tolist(), fold.tolist(), strict=True)}) == 30
    expected = (held_out_information(first, second) + held_out_information(second, first)) / 2
    np.testing.assert_allclose(analyse(trace).held_out_bits, expected, atol=1e-12)


def test_a_trace_a_source_and_chunks_give_the_same():
    trace = labelled_trace()
    document = analyse(trace).summary()
    assert analyse(MemorySource(trace)).summary() == document
    assert analyse([trace]).summary() == document
    assert analyse(trace, threads=1).summary() == document


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_layers": 1},
        {"top_k": 1},
        {"num_experts": 1, "top_k": 1},
        {"num_tokens": 1},
        {"num_experts": 12, "top_k": 4, "variable_k": True},
    ],
)
def test_the_summary_is_json_with_null_for_what_is_not_known(shape):
    trace = random_trace(**shape)
    document = analyse(trace).summary()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    overall = document["overall"]
    assert overall["num_tokens"] == trace.num_tokens
    assert len(overall["load"]["gini"]["per_layer"]) == trace.num_layers
    bits = overall["affinity"]["all_pairs"]
    assert len(bits["raw_bits"]["per_layer"]) == trace.num_layers - 1
    assert bits["held_out_bits"]["mean"] is None  # a single request
    assert document["labels"] == {}
    assert document["drift"] == {"phases": None, "request_halves": None}


def test_the_summary_shows_phases_labels_and_drift():
    document = analyse(labelled_trace()).summary(num_ranks=[3])
    assert document["phases"]["prefill"]["num_tokens"] > 0
    assert document["overall"]["headroom"][0]["num_ranks"] == 3
    for label in ("", "chat", "code"):
        drift = document["labels"][label]["drift_from_rest"]
        assert 0 < drift["total_variation"]["mean"] < 1
    for name in ("phases", "request_halves"):
        assert 0 < document["drift"][name]["cosine"]["mean"] < 1


def test_a_single_label_has_no_rest():
    trace = random_trace(labels={0: "chat"})
    document = analyse(trace).summary()
    assert document["labels"]["chat"]["drift_from_rest"] is None


def test_ranks_of_the_headroom_are_powers_of_two_that_divide_the_experts():
    document = summary(count(random_trace(num_experts=24, top_k=2)))
    assert [h["num_ranks"] for h in document["headroom"]] == [2, 4, 8]


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        analyse(random_trace(num_tokens=0))


def test_importing_the_analysis_loads_nothing_heavy():
    script = (
        "import sys, placer.affinity;"
        "print([m for m in ('numba', 'scipy', 'networkx', 'torch', 'pyarrow') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(not REAL_TRACE.exists(), reason="the GPT-OSS trace is not here")
def test_gpt_oss_has_half_a_bit_of_affinity_and_hot_experts():
    found = analyse(open_trace(REAL_TRACE))
    assert isinstance(found.overall, Affinity)
    document = found.summary()["overall"]
    bits = document["affinity"]["all_pairs"]
    assert bits["raw_bits"]["mean"] == pytest.approx(0.5206, abs=0.0005)
    assert bits["chance_bits"]["mean"] < 0.001
    assert bits["held_out_bits"]["mean"] == pytest.approx(0.515, abs=0.005)
    hottest = document["load"]["max_over_mean"]
    assert hottest["mean"] == pytest.approx(2.61, abs=0.01)
    assert 1.9 < min(hottest["per_layer"]) < max(hottest["per_layer"]) < 4
    assert document["coactivation"]["half_share"]["mean"] == pytest.approx(0.087, abs=0.001)

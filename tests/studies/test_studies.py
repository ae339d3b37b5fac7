"""Studies: who judges what, figures recomputed plainly, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from placer.placement import contiguous_like
from placer.planning import Settings
from placer.report.studies import deep_tables
from placer.studies import deep, transfer
from placer.studies.deep import deep_analysis
from placer.studies.fitting import fit, halve
from placer.studies.learning import enough
from placer.trace import MemorySource, make_trace
from tests.conftest import topic_trace

SETTINGS = Settings(num_ranks=4, max_imbalance=1.1, cap_is_default=True)


@pytest.fixture(scope="module")
def source():
    """48 requests: each label has its own routing, so that plans of one do not suit another."""
    parts = [topic_trace(seed=seed, num_requests=24, num_layers=3) for seed in (1, 2)]
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("experts", "position", "phase")
    }
    request = np.concatenate([parts[0].request, parts[1].request + 24])
    labels = {i: "first" if i < 24 else "second" for i in range(48)}
    trace = make_trace(**joined, num_experts=16, request=request, labels=labels)
    return MemorySource(trace)


@pytest.fixture(scope="module")
def document(source):
    return deep_analysis(source, SETTINGS)


def messages(trace, table):
    """Messages of alltoall dispatch per token-layer, counted token by token."""
    slots = table.shape[1] // 4
    rank_of = [{int(e): s // slots for s, e in enumerate(row) if e >= 0} for row in table]
    sent = 0
    for token, request in zip(trace.experts.tolist(), trace.request.tolist(), strict=True):
        for layer, chosen in enumerate(token):
            ranks = {rank_of[layer][e] for e in chosen if e >= 0}
            sent += len(ranks - {request % 4})
    return sent / (trace.num_tokens * trace.num_layers)


def imbalance(trace, table):
    slots = table.shape[1] // 4
    ratios = []
    for layer, row in enumerate(table):
        rank_of = {int(e): s // slots for s, e in enumerate(row) if e >= 0}
        load = [0] * 4
        for e in trace.experts[:, layer].ravel().tolist():
            if e >= 0:
                load[rank_of[e]] += 1
        ratios.append(max(load) * 4 / sum(load))
    return sum(ratios) / len(ratios)


def test_no_request_is_both_fitted_to_and_judged_on(source):
    halves = halve(source, SETTINGS)
    parts = transfer.label_parts(halves, source) | transfer.time_parts(halves, source)
    parts |= transfer.phase_parts(halves)
    assert list(parts) == ["first", "second", "first half", "second half", "prefill", "decode"]
    fitted, judged = set(), set()
    for part in parts.values():
        fitted |= set(part.fit.request_ids().tolist())
        judged |= set(part.judge.request_ids().tolist())
    assert not fitted & judged
    assert fitted | judged == set(range(48))
    assert set(parts["first"].judge.request_ids().tolist()) <= set(range(24))
    assert set(parts["decode"].fit.read().phase.tolist()) == {1}


def test_headroom_holds_what_plain_counting_finds(source, document):
    found = document["headroom"]
    halves = halve(source, SETTINGS)
    fitted = fit(halves.fit, SETTINGS)
    plan, contiguous = fitted.placement, contiguous_like(fitted.placement)
    on_fit, on_judge = halves.fit.read(), halves.judge.read()
    assert found["contiguous"] == pytest.approx(messages(on_fit, contiguous.physical_to_logical))
    assert found["reached"] == pytest.approx(messages(on_fit, plan.physical_to_logical))
    assert found["bound"] <= found["reached"] < found["contiguous"]
    assert found["gain_reached"] == pytest.approx(1 - found["reached"] / found["contiguous"])
    held_out = found["held_out"]
    assert held_out["plan"]["messages_alltoall"]["value"] == pytest.approx(
        messages(on_judge, plan.physical_to_logical)
    )
    assert held_out["plan"]["imbalance"]["value"] == pytest.approx(
        imbalance(on_judge, plan.physical_to_logical)
    )
    change = held_out["change"]["messages_alltoall"]
    assert change["change_low"] < change["change"] < change["change_high"] < 0
    balance = found["balance"]
    assert balance["bound"] <= balance["reached"] <= balance["contiguous"]
    assert balance["contiguous"] == pytest.approx(imbalance(on_fit, contiguous.physical_to_logical))


def test_a_plan_of_another_workload_costs_and_the_own_one_does_not(source, document):
    assert [row["judged_on"] for row in document["labels"]] == ["first", "second"]
    halves = halve(source, SETTINGS)
    parts = transfer.label_parts(halves, source)
    for row in document["labels"]:
        plans = {plan["fitted_to"]: plan for plan in row["plans"]}
        assert list(plans) == ["contiguous", "all", "first", "second"]
        own = row["judged_on"]
        other = "second" if own == "first" else "first"
        assert plans[own]["own"]
        assert not plans[other]["own"]
        assert plans[own]["price"]["messages_alltoall"]["change"] == 0
        stale = plans[other]["price"]["messages_alltoall"]
        assert 0 < stale["change_low"] < stale["change"]
        table = fit(parts[other].fit, SETTINGS).placement.physical_to_logical
        expected = messages(parts[own].judge.read(), table)
        assert plans[other]["figures"]["messages_alltoall"]["value"] == pytest.approx(expected)


def test_phases_of_the_same_routing_share_a_plan(document):
    assert [row["judged_on"] for row in document["phases"]] == ["prefill", "decode"]
    for row in document["phases"]:
        price = next(p for p in row["plans"] if p["fitted_to"] == "all")["price"]
        assert abs(price["messages_alltoall"]["change"]) < 0.1


def test_the_learning_curve_ends_where_the_headroom_was_measured(document):
    points = document["learning"]
    assert [(p["by"], p["requests"]) for p in points[:6]] == [
        ("all", 24), ("requests", 1), ("requests", 2), ("requests", 4), ("requests", 8),
        ("requests", 16),
    ]  # fmt: skip
    assert [p["tokens"] for p in points if p["by"] == "tokens"] == [64, 256]
    held_out = document["headroom"]["held_out"]
    assert points[0]["change"] == held_out["change"]
    assert points[0]["figures"] == held_out["plan"]
    assert document["enough"]["requests"] <= 24


def point(by, requests, change, imbalance):
    return {
        "by": by,
        "requests": requests,
        "tokens": requests * 10,
        "change": {"messages_alltoall": {"change": change}},
        "figures": {"imbalance": {"value": imbalance}},
    }


def test_enough_is_where_gain_and_balance_stay():
    curve = [
        point("all", 32, -0.20, 1.10),
        point("requests", 4, -0.20, 1.10),  # luck: the next one is worse
        point("requests", 8, -0.18, 1.10),
        point("requests", 16, -0.195, 1.12),
    ]
    assert enough(curve, SETTINGS, "requests") == 16
    curve[2] = point("requests", 8, -0.20, 1.16)  # balance is lost
    assert enough(curve, SETTINGS, "requests") == 16
    curve[2] = point("requests", 8, -0.20, 1.15)
    assert enough(curve, SETTINGS, "requests") == 4
    assert enough([point("all", 32, 0.01, 1.1)], SETTINGS, "requests") is None
    assert enough(curve[1:], SETTINGS, "requests") is None


def test_ctrl_c_keeps_what_was_found(source, document):
    told = []

    def interrupt(text):
        told.append(text)
        if text.startswith("judging every plan on decode"):
            signal.raise_signal(signal.SIGINT)

    found = deep_analysis(source, SETTINGS, interrupt)
    assert found["interrupted"]
    assert found["headroom"] == document["headroom"]
    assert found["phases"] == document["phases"][:1]
    assert found["labels"] == found["learning"] == []
    assert found["enough"] is None
    assert "interrupted" in str(deep_tables(found)[-1])


def test_a_search_that_is_cut_short_is_no_figure(source, monkeypatch):
    calls = []

    def cut(part, settings):
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(part, settings)

    monkeypatch.setattr(transfer, "fit", cut)
    found = deep_analysis(source, SETTINGS)
    assert found["interrupted"]
    assert found["headroom"] is not None
    assert found["phases"] == []


def test_allgather_is_judged_by_balance(source, monkeypatch):
    monkeypatch.setattr(deep, "learning_curve", lambda *_: iter(()))
    found = deep_analysis(source, Settings(num_ranks=4, dispatch="allgather"))
    assert found["headline"] == "imbalance"
    assert found["headroom"]["figure"] in ("balance", "imbalance")
    assert found["headroom"]["held_out"]["figures"][0] == "imbalance"
    json.dumps(found, allow_nan=False)


def test_documents_are_json_and_render(document):
    json.dumps(document, allow_nan=False)
    assert len(deep_tables(document)) > 10

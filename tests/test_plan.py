"""Placements and plans: what is sound, and what survives a round through the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.baselines import baseline_placement
from placer.errors import BadFileError, UsageError
from placer.placement import Placement, contiguous
from placer.plan import Plan, plan_from_document, read_plan, write_plan
from placer.trace import ModelDims


def table_of(*rows):
    return np.array(rows, np.int64)


@given(
    num_layers=st.integers(1, 3),
    num_experts=st.integers(1, 40),
    num_ranks=st.integers(1, 12),
    spare=st.integers(0, 2),
)
def test_contiguous_is_sound_in_order_and_even(num_layers, num_experts, num_ranks, spare):
    slots = -(-num_experts // num_ranks) + spare
    placement = contiguous(num_layers, num_experts, num_ranks, slots, num_ranks)
    assert placement.problems() == []
    row = placement.physical_to_logical[0]
    assert row[row >= 0].tolist() == list(range(num_experts))
    held = (row.reshape(num_ranks, -1) >= 0).sum(axis=1)
    assert held.max() - held.min() <= 1


def test_a_placement_knows_the_ranks_of_every_copy():
    placement = Placement(table_of([0, 1, 2, 0, -1, 2]), 3, 3, 3)
    assert placement.problems() == []
    assert placement.ranks_of_experts().tolist() == [[[0, 1], [0, -1], [1, 2]]]


@pytest.mark.parametrize(
    ("table", "ranks_per_node", "problem"),
    [
        (table_of([0, 1, 2]), 2, "cannot be divided"),
        (table_of([0, 1, 2, 3]), 3, "3 ranks per node do not divide 2 ranks"),
        (table_of([0, 1]), 2, "2 slots cannot hold 4 experts"),
        (table_of([0, 1, 2, 4]), 2, "expert ids must lie in -1..3"),
        (table_of([0, 1, 2, -2]), 2, "expert ids must lie in -1..3"),
        (table_of([0, 1, 2, 3], [0, 1, 2, 2]), 2, "layer 1: no slot holds expert 3"),
        (table_of([0, 0, 1, 2, 3, -1]), 2, "layer 0: rank 0 holds an expert twice"),
    ],
)
def test_what_is_unsound_is_said(table, ranks_per_node, problem):
    assert any(problem in found for found in Placement(table, 4, 2, ranks_per_node).problems())


def test_empty_slots_are_no_expert_twice():
    assert Placement(table_of([0, -1, -1, 1, -1, -1]), 2, 2, 2).problems() == []


@pytest.fixture
def plan():
    placement = Placement(table_of([0, 1, 2, 0, -1, 2], [2, 1, 0, -1, -1, -1]), 3, 3, 1)
    return Plan(
        placement=placement,
        layer_ids=(3, 7),
        model=ModelDims("m", hidden_size=8, expert_bytes=100, expert_flops_per_token=2.5),
        dispatch="coherent",
        certificate={
            "objective": "traffic",
            "value": 1.25,
            "lower_bound": None,
            "gap": None,
            "status": "feasible",
        },
        provenance={"seed": 4, "inputs": [{"fingerprint": "ab"}], "own": {"x": [1]}},
        timings={"solve_s": 0.5},
    )


def test_a_plan_survives_its_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(plan, path)
    back = read_plan(path)
    assert back.to_document() == plan.to_document()
    assert back.placement.physical_to_logical.dtype == np.int64
    assert (back.placement.num_ranks, back.placement.num_nodes) == (3, 3)


def test_a_plan_file_names_its_format_first_and_holds_what_the_design_lists(plan):
    document = plan.to_document()
    assert list(document)[:2] == ["format", "schema_version"]
    assert set(document) == {
        "format", "schema_version", "model", "layer_ids", "num_experts", "num_ranks",
        "ranks_per_node", "slots_per_rank", "physical_to_logical", "dispatch", "prediction",
        "certificate", "provenance", "timings",
    }  # fmt: skip
    assert document["slots_per_rank"] == 2


def test_a_plan_of_the_required_keys_alone_is_read(plan):
    document = plan.to_document()
    for key in ("model", "dispatch", "prediction", "certificate", "provenance", "timings"):
        del document[key]
    bare = plan_from_document(document, "here")
    assert (bare.dispatch, bare.prediction, bare.model) == ("alltoall", {}, ModelDims())


def test_keys_that_placer_does_not_know_are_left_aside(plan):
    document = plan.to_document() | {"comment": "by hand"}
    assert plan_from_document(document, "here").layer_ids == (3, 7)


def test_the_first_thing_wrong_is_named_by_its_key(plan):
    document = json.loads(json.dumps(plan.to_document()))
    document["physical_to_logical"][1][2] = 1.5
    with pytest.raises(BadFileError, match=r"here: physical_to_logical\.1\.2: .*found 1\.5"):
        plan_from_document(document, "here")


def test_an_unsound_plan_can_be_neither_read_nor_hidden(plan):
    document = plan.to_document()
    document["physical_to_logical"] = [[0, 1, 1, 0, -1, -1]] * 2
    with pytest.raises(BadFileError, match="no slot holds expert 2"):
        plan_from_document(document, "here")


def test_a_baseline_is_contiguous_or_another_plan_of_the_same_model(plan, tmp_path):
    found = baseline_placement("contiguous", plan)
    assert found.physical_to_logical.tolist() == [[0, -1, 1, -1, 2, -1]] * 2
    path = tmp_path / "plan.json"
    write_plan(plan, path)
    same = baseline_placement(str(path), plan)
    assert (same.physical_to_logical == plan.placement.physical_to_logical).all()
    other = replace(plan, placement=contiguous(3, 3, 3, 1, 3), layer_ids=(1, 2, 3))
    write_plan(other, path, force=True)
    with pytest.raises(UsageError, match="3 layers x 3 experts"):
        baseline_placement(str(path), plan)
    with pytest.raises(UsageError, match="no baseline is called 'eplb'"):
        baseline_placement("eplb", plan)


def test_a_baseline_of_other_layers_is_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(replace(plan, layer_ids=(3, 8)), path)
    with pytest.raises(UsageError, match="other layers"):
        baseline_placement(str(path), plan)


def test_every_key_of_the_file_is_documented(plan):
    page = (Path(__file__).parent.parent / "docs" / "plans.md").read_text()
    for key in plan.to_document():
        assert key in page, key
    for key in plan.certificate:
        assert key in page, key

"""Engines' plans: what is written is read back; what is damaged or impossible is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.engines.plans.tables import fill_empty_slots
from placer.engines.readers.common import ranges
from placer.engines.registry import (
    ENGINES,
    ExportOptions,
    PlanFormat,
    PlanHints,
    engine_named,
    recognised_plan,
)
from placer.errors import BadFileError, InfeasibleError, PlacerError, UsageError
from placer.placement import Placement, contiguous
from placer.plan import Plan

from .cases import KIND_IDS, KINDS, experts_by_rank, hints_of, plans, random_plan

pytest.importorskip("torch")
pytest.importorskip("safetensors")

every_kind = pytest.mark.parametrize(("name", "kind"), KINDS, ids=KIND_IDS)
FORCE = ExportOptions(force=True)


def write(plan: Plan, kind: PlanFormat, folder: Path, options: ExportOptions = FORCE) -> Path:
    path = folder / f"engine{kind.suffix}"
    kind.write(plan, path, options)
    return path


def without_copies() -> Plan:
    """Experts in order on 4 ranks, one slot in three empty."""
    return Plan(contiguous(2, 8, 4, 3, 4), (0, 1))


@every_kind
@given(plan=plans())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_plan_comes_back_as_it_was_written(name, kind, plan, tmp_path):
    path = write(plan, kind, tmp_path)
    assert recognised_plan(name, path) is not None
    back = kind.read(path, hints_of(plan)).plan
    assert back.layer_ids == plan.layer_ids
    assert back.placement.num_experts == plan.placement.num_experts
    assert back.placement.num_ranks == plan.placement.num_ranks
    assert back.placement.ranks_per_node == plan.placement.ranks_per_node
    table = plan.placement.physical_to_logical
    if name == "omni-infer":  # a pattern says which experts, not in which order
        table = np.sort(table.reshape(-1, plan.placement.slots_per_rank)).reshape(table.shape)
    assert np.array_equal(back.placement.physical_to_logical, table)


@every_kind
def test_the_same_plan_gives_the_same_bytes(name, kind, tmp_path):
    first = write(random_plan(1), kind, tmp_path).read_bytes()
    assert write(random_plan(1), kind, tmp_path).read_bytes() == first
    assert write(random_plan(2), kind, tmp_path).read_bytes() != first


@every_kind
def test_slots_that_every_rank_leaves_empty_are_left_away(name, kind, tmp_path):
    plan = without_copies()
    back = kind.read(write(plan, kind, tmp_path), hints_of(plan)).plan.placement
    assert back.slots_per_rank == 2
    assert experts_by_rank(back) == experts_by_rank(plan.placement)


def uneven() -> Plan:
    """7 experts on 4 ranks: one slot stays empty in each layer."""
    return Plan(contiguous(2, 7, 4, 2, 4), (3, 4))


@every_kind
def test_uneven_ranks_are_refused_with_the_layer_and_what_to_do(name, kind, tmp_path):
    if name == "rank-lists":
        back = kind.read(write(uneven(), kind, tmp_path), PlanHints()).plan
        assert experts_by_rank(back.placement) == experts_by_rank(uneven().placement)
        return
    with pytest.raises(InfeasibleError, match="in layer 3 rank 3 leaves 1 of 2 empty") as refused:
        write(uneven(), kind, tmp_path)
    assert "--fill-empty" in refused.value.hint
    assert "--gpus 4 --slots-per-rank 2" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


@every_kind
def test_fill_empty_gives_the_same_placement_and_further_copies(name, kind, tmp_path):
    plan = uneven()
    path = write(plan, kind, tmp_path, ExportOptions(fill_empty=True, force=True))
    back = kind.read(path, hints_of(plan)).plan.placement
    before, after = experts_by_rank(plan.placement), experts_by_rank(back)
    assert all(
        b <= a for x, y in zip(before, after, strict=True) for b, a in zip(x, y, strict=True)
    )
    if name != "rank-lists":
        assert (back.physical_to_logical >= 0).all()


@given(plan=plans(), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_filling_keeps_what_is_there_and_evens_out_the_copies(plan, seed):
    placement = plan.placement
    holes = np.random.default_rng(seed).random(placement.physical_to_logical.shape) < 0.4
    table = np.where(holes, -1, placement.physical_to_logical)
    filled = fill_empty_slots(replace(placement, physical_to_logical=table))
    assert np.array_equal(filled.physical_to_logical[~holes], table[~holes])
    assert filled.problems() == []  # so that every expert has a slot again
    assert (filled.physical_to_logical >= 0).all()


def test_more_slots_than_experts_cannot_be_filled():
    placement = Placement(np.array([[0, 1, -1, 1, -1, -1]]), 2, 2, 2)
    with pytest.raises(InfeasibleError, match="3 slots per rank"):
        fill_empty_slots(placement)


@pytest.mark.parametrize(("name", "kind"), [k for k in KINDS if k[0] in ("sglang", "fastdeploy")])
def test_rows_of_dense_layers_are_written_and_left_out_again(name, kind, tmp_path):
    plan = random_plan(5)
    options = ExportOptions(num_layers=plan.layer_ids[-1] + 3, force=True)
    path = write(plan, kind, tmp_path, options)
    whole = kind.read(path, PlanHints(gpus=4))
    assert len(whole.plan.layer_ids) == plan.layer_ids[-1] + 3
    dense = sorted(set(whole.plan.layer_ids) - set(plan.layer_ids))
    assert any(ranges(dense) in warning for warning in whole.warnings)
    with pytest.raises(UsageError, match=r"--num-layers"):
        kind.write(plan, path, ExportOptions(num_layers=plan.layer_ids[-1], force=True))


@pytest.mark.parametrize(("name", "kind"), [k for k in KINDS if k[0] in ("sglang", "tensorrt-llm")])
def test_a_file_that_does_not_name_its_ranks_needs_gpus(name, kind, tmp_path):
    path = write(random_plan(0), kind, tmp_path)
    with pytest.raises(UsageError, match="how many ranks"):
        kind.read(path, PlanHints())
    with pytest.raises(UsageError, match="evenly"):
        kind.read(path, PlanHints(gpus=5))


@every_kind
def test_hints_that_contradict_the_file_are_refused(name, kind, tmp_path):
    plan = random_plan(0)
    path = write(plan, kind, tmp_path)
    hints = hints_of(plan)
    for wrong, said in (
        (replace(hints, num_experts=9), "--num-experts 9"),
        (replace(hints, nodes=3), "nodes"),
        (replace(hints, layer_ids=(1, 99)), "--layer-ids"),
    ):
        with pytest.raises(UsageError, match=said):
            kind.read(path, wrong)


def test_eplb_tensors_say_their_ranks_and_layers_themselves(tmp_path):
    plan = random_plan(3)
    kind = next(ENGINES["eplb"].plan_formats())
    back = kind.read(write(plan, kind, tmp_path), PlanHints()).plan
    assert (back.layer_ids, back.placement.num_ranks) == (plan.layer_ids, 4)


def test_a_rank_that_holds_an_expert_twice_is_read_as_holding_it_once(tmp_path):
    kind = next(ENGINES["sglang"].plan_formats())
    path = tmp_path / "twice.json"
    path.write_text('{"physical_to_logical_map": [[0, 0, 1, 2], [0, 1, 2, 1]]}')
    imported = kind.read(path, PlanHints(gpus=2))
    assert imported.plan.placement.physical_to_logical.tolist() == [[0, -1, 1, 2], [0, 1, 2, 1]]
    assert "1 slots repeat" in imported.warnings[0]


@every_kind
def test_truncated_files_are_refused_in_one_line(name, kind, tmp_path):
    path = write(random_plan(4), kind, tmp_path)
    whole = path.read_bytes()
    for length in sorted({0, 1, 9, *range(10, len(whole) - 2, max(1, len(whole) // 12))}):
        path.write_bytes(whole[:length])
        with pytest.raises(PlacerError) as refused:
            kind.read(path, hints_of(random_plan(4)))
        assert refused.value.exit_code in (2, 5)
        assert "\n" not in refused.value.message
    path.unlink()
    with pytest.raises(BadFileError, match="does not exist"):
        kind.read(path, hints_of(random_plan(4)))
    path.mkdir()
    with pytest.raises(BadFileError):
        kind.read(path, hints_of(random_plan(4)))


@every_kind
def test_changed_bytes_give_a_sound_plan_or_a_clear_refusal(name, kind, tmp_path):
    path = write(random_plan(6), kind, tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        assert said_or_read(kind, path) == []


def said_or_read(kind: PlanFormat, path: Path) -> list[str]:
    """What is wrong with the plan, or with the message that refuses the file."""
    try:
        plan = kind.read(path, PlanHints(gpus=4)).plan
    except PlacerError as refused:
        return [refused.message] if "\n" in refused.message else []
    return plan.placement.problems()


UNSOUND = {
    "no expert 2": [[0, 1, 3, 0], [0, 1, 2, 3]],
    "a negative expert": [[0, 1, 2, -2], [0, 1, 2, 3]],
    "too large an expert": [[0, 1, 2, 99], [0, 1, 2, 3]],
    "an enormous expert": [[0, 1, 2, 10**12], [0, 1, 2, 3]],
    "rows of unequal length": [[0, 1, 2, 3], [0, 1, 2]],
    "no rows": [],
    "an empty row": [[], []],
    "text": [["0", 1, 2, 3], [0, 1, 2, 3]],
    "a fraction": [[0.5, 1, 2, 3], [0, 1, 2, 3]],
    "a truth": [[True, 1, 2, 3], [0, 1, 2, 3]],
    "no table": 7,
    "null": None,
}


@pytest.mark.parametrize("rows", UNSOUND.values(), ids=UNSOUND)
@pytest.mark.parametrize(
    ("engine", "suffix", "document"),
    [
        ("sglang", ".json", lambda rows: {"physical_to_logical_map": rows}),
        ("fastdeploy", ".json", lambda rows: {"ep_rank_to_expert_id_list": rows}),
        (
            "tensorrt-llm",
            ".yaml",
            lambda rows: {
                "num_slots": 4,
                "initial_global_assignments": dict(enumerate(rows))
                if isinstance(rows, list)
                else rows,
            },
        ),
        (
            "vllm-ascend",
            ".json",
            lambda rows: {
                "moe_layer_count": len(rows) if isinstance(rows, list) else 2,
                "layer_list": [
                    {"device_list": [{"device_expert": row[:2]}, {"device_expert": row[2:]}]}
                    for row in rows
                ]
                if isinstance(rows, list)
                else rows,
            },
        ),
        (
            "rank-lists",
            ".json",
            lambda rows: (
                {str(n): [row[:2], row[2:]] for n, row in enumerate(rows)}
                if isinstance(rows, list)
                else rows
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0] != "." else "",
)
def test_unsound_placements_are_refused(engine, suffix, document, rows, tmp_path):
    path = tmp_path / f"bad{suffix}"
    dump = json.dumps if suffix == ".json" else yaml.safe_dump
    path.write_text(dump(document(rows)))
    kind = next(ENGINES[engine].plan_formats())
    with pytest.raises(BadFileError) as refused:
        kind.read(path, PlanHints(gpus=2))
    assert "\n" not in refused.value.message
    assert str(path) in refused.value.message


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "other.json"
    for name in ("sglang", "fastdeploy", "vllm-ascend", "rank-lists"):
        kind = next(ENGINES[name].plan_formats())
        for document in ([1, 2], {"a": 1}, "text", None, {"layer_list": [1]}, {"0": 3}):
            path.write_text(json.dumps(document))
            with pytest.raises(BadFileError):
                kind.read(path, PlanHints(gpus=2))


def test_contradictions_within_a_file_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    kind = next(ENGINES["eplb"].plan_formats())
    path = write(random_plan(7), kind, tmp_path)
    arrays = load_file(path)
    for key in ("logcnt", "log2phy"):
        changed = {name: array.copy() for name, array in arrays.items()}
        changed[key].flat[0] += 1
        save_file(changed, path)
        with pytest.raises(BadFileError, match=key):
            kind.read(path, PlanHints(gpus=4))
    kind = next(ENGINES["fastdeploy"].plan_formats())
    path = write(random_plan(7), kind, tmp_path)
    document = json.loads(path.read_text())
    document["expert_in_rank_num_list"][0][0] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(BadFileError, match="expert_in_rank_num_list"):
        kind.read(path, PlanHints(gpus=4))


def test_eplb_may_number_the_copies_of_an_expert_in_any_order(tmp_path):
    from safetensors.numpy import load_file, save_file

    kind = next(ENGINES["eplb"].plan_formats())
    plan = random_plan(7)
    path = write(plan, kind, tmp_path)
    arrays = load_file(path)
    padded = np.pad(arrays["log2phy"], ((0, 0), (0, 0), (0, 2)), constant_values=-1)
    arrays["log2phy"] = np.ascontiguousarray(padded[:, :, ::-1])
    save_file(arrays, path)
    back = kind.read(path, hints_of(plan)).plan.placement
    assert np.array_equal(back.physical_to_logical, plan.placement.physical_to_logical)


def test_pickles_are_never_run(tmp_path):
    import pickle

    import torch

    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (ran.mkdir, ())

    path = tmp_path / "bomb.pt"
    torch.save({"physical_to_logical_map": Bomb()}, path)
    kind = next(kind for _, kind in KINDS if kind.suffix == ".pt")
    with pytest.raises(BadFileError, match="unpickles nothing"):
        kind.read(path, PlanHints(gpus=2))
    assert kind.recognises(path) is False
    omni = next(ENGINES["omni-infer"].plan_formats())
    path = tmp_path / "bomb.npy"
    np.save(path, np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(BadFileError):
        omni.read(path, PlanHints())
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadFileError):
        omni.read(path, PlanHints())
    assert not ran.exists()


def test_what_sglang_records_is_not_taken_for_a_plan(tmp_path):
    import torch

    path = tmp_path / "recorded.pt"
    counts = torch.zeros(2, 4)
    torch.save({"logical_count": counts, "physical_to_logical_map": counts}, path)
    assert recognised_plan("sglang", path) is None
    assert recognised_plan("no such engine", path) is None


def test_tensorrt_llm_options_may_hold_the_balancer(tmp_path):
    plan = random_plan(8)
    kind = next(ENGINES["tensorrt-llm"].plan_formats())
    path = write(plan, kind, tmp_path)
    balancer = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump({"moe_config": {"backend": "WIDEEP", "load_balancer": balancer}})
    )
    back = kind.read(path, PlanHints(gpus=4)).plan
    assert np.array_equal(back.placement.physical_to_logical, plan.placement.physical_to_logical)
    path.write_text(yaml.safe_dump({**balancer, "num_experts": 8}))
    with pytest.raises(BadFileError, match="num_experts, which TensorRT-LLM refuses"):
        kind.read(path, PlanHints(gpus=4))
    path.write_text(yaml.safe_dump({**balancer, "ep_size": 4}))
    assert kind.read(path, PlanHints()).plan.placement.num_ranks == 4
    path.write_text(yaml.safe_dump({**balancer, "num_slots": 11}))
    with pytest.raises(BadFileError, match="num_slots 11"):
        kind.read(path, PlanHints(gpus=4))


def test_engines_and_their_files_are_known_by_name(tmp_path):
    with pytest.raises(UsageError, match="no plans for 'triton'"):
        engine_named("triton")
    with pytest.raises(UsageError, match=r"\.json or \.pt"):
        engine_named("sglang").format_to_write(tmp_path / "plan.yaml")
    assert engine_named("sglang").format_to_write(tmp_path / "plan.pt").suffix == ".pt"

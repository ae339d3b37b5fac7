"""Readers of engines' records, on files laid out as the engines' code documents."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from placer.engines.importing import import_records
from placer.engines.records import RECORD_FORMATS, Hints
from placer.errors import BadFileError, PlacerError, UsageError
from placer.trace import Trace, open_trace
from placer.trace.load import LoadRecord, read_load
from tests.engine_records.files import (
    EXPERTS,
    LAYERS,
    MOE_LAYERS,
    TOP_K,
    load_of,
    routing,
    sglang_response,
    vllm_load_lines,
    vllm_response,
    with_dense,
    write_lines,
)

SLOTS = 10  # of SGLang: every expert once, and two replicas
MAP = np.stack(
    [np.r_[np.random.default_rng(i).permutation(EXPERTS), [3, 5]] for i in range(LAYERS)]
)


def read(name: str, path: Path, **hints: object) -> Trace | LoadRecord:
    return RECORD_FORMATS[name].read(path, Hints(**hints)).content  # type: ignore[arg-type]


def slots_of(experts: np.ndarray) -> np.ndarray:
    """[LAYERS, tokens, 8] SGLang's slots for logical experts, dense layer and unused places -1."""
    out = np.full((LAYERS, len(experts), 8), -1, np.int32)
    for i, layer in enumerate(MOE_LAYERS):
        first_slot = np.argsort(MAP[layer, :EXPERTS])
        out[layer, :, :TOP_K] = first_slot[experts[:, i]]
    return out


def per_token_record(torch, experts, positions, lengths, mode, number, rank=0):
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [7] * len(positions),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(slots_of(experts)),
        "misc_objects": [],
        "global_physical_count": torch.zeros(LAYERS, SLOTS, dtype=torch.int32),
    }


def test_sglang_stat_is_load_by_forward_pass(tmp_path):
    torch = pytest.importorskip("torch")
    passes = [load_of(routing(seed)) for seed in range(3)]
    count = np.stack([with_dense(one, 0) for one in passes] + [np.zeros((LAYERS, EXPERTS), int)])
    path = tmp_path / "expert_distribution_recorder_1.5.pt"
    torch.save(
        {
            "rank": 0,
            "logical_count": torch.tensor(count, dtype=torch.int32),
            "average_utilization_rate_over_window": None,
        },
        path,
    )
    record = read("sglang", path)
    assert isinstance(record, LoadRecord)
    np.testing.assert_array_equal(record.load, np.stack(passes))  # the unused buffer row is gone
    assert record.layer_ids.tolist() == MOE_LAYERS


def test_sglang_per_pass_is_summed_over_ranks_and_replicas(tmp_path):
    torch = pytest.importorskip("torch")
    counts = np.random.default_rng(0).integers(0, 9, (2, 2, LAYERS, SLOTS))  # [ranks, passes, ...]
    counts[:, :, 0] = 0
    for rank in range(2):
        records = [
            {
                "forward_pass_id": 40 + number,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(counts[rank, number], dtype=torch.int32),
            }
            for number in range(2)
        ]
        torch.save(
            {"records": records, "last_physical_to_logical_map": torch.tensor(MAP)},
            tmp_path / f"expert_distribution_recorder_1.5_{rank}.pt",
        )
    record = read("sglang", tmp_path)
    assert isinstance(record, LoadRecord)
    expected = np.zeros((2, LAYERS, EXPERTS), int)
    for number in range(2):
        for layer in range(LAYERS):
            for slot in range(SLOTS):
                expected[number, layer, MAP[layer, slot]] += counts[:, number, layer, slot].sum()
    np.testing.assert_array_equal(record.load, expected[:, MOE_LAYERS])


def test_sglang_per_token_is_a_trace_with_requests_joined_by_position(tmp_path):
    torch = pytest.importorskip("torch")
    experts = routing(3, 12)
    records = [  # two prompts of 3 and 2; the first is chunked; then two decode passes
        per_token_record(torch, experts[:4], [0, 1, 0, 1], [2, 2], 1, 10),
        per_token_record(torch, experts[4:5], [2], [1], 1, 11),
        per_token_record(torch, experts[5:7], [3, 2], None, 2, 12),
        per_token_record(torch, experts[7:9], [4, 3], None, 2, 13),
        per_token_record(torch, experts[9:12], [0, 1, 2], [3], 1, 14),
    ]
    torch.save(
        {"records": records, "last_physical_to_logical_map": torch.tensor(MAP)},
        tmp_path / "expert_distribution_recorder_1.5_0.pt",
    )
    torch.save(  # tensor parallelism: the other rank saw the same tokens
        {
            "records": [{**record, "rank": 1} for record in records],
            "last_physical_to_logical_map": torch.tensor(MAP),
        },
        tmp_path / "expert_distribution_recorder_1.5_1.pt",
    )
    trace = read("sglang", tmp_path)
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.experts, experts)
    assert trace.layer_ids.tolist() == MOE_LAYERS
    assert trace.num_experts == EXPERTS
    assert trace.request.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 1, 2, 2, 2]
    assert trace.position.tolist() == [0, 1, 0, 1, 2, 3, 2, 4, 3, 0, 1, 2]
    assert trace.phase[5:9].tolist() == [1, 1, 1, 1]
    assert trace.phase[[0, 1, 2, 3, 9, 10, 11]].tolist() == [0] * 7
    assert trace.step is not None
    assert trace.step.tolist() == [10] * 4 + [11] + [12] * 2 + [13] * 2 + [14] * 3
    assert trace.home is None


def test_routed_experts_of_vllm(tmp_path):
    first, second = routing(0, 9), routing(1, 6)
    cut = vllm_response(second, 4)
    cut["usage"]["prompt_tokens"] = 6  # routed_experts_prompt_start = 2
    path = write_lines(tmp_path / "r.jsonl", [vllm_response(first, 5, label="code"), cut])
    trace = read("routed-experts", path, num_experts=EXPERTS)
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.experts, np.concatenate([first, second]))
    assert trace.layer_ids.tolist() == MOE_LAYERS
    assert trace.request.tolist() == [0] * 9 + [1] * 6
    assert trace.position.tolist() == [*range(9), *range(2, 8)]
    assert trace.phase.tolist() == [0] * 5 + [1] * 4 + [0] * 4 + [1] * 2
    assert trace.labels == {0: "code"}


def test_routed_experts_of_sglang(tmp_path):
    experts = routing(0, 9)
    path = tmp_path / "r.json"
    path.write_text(json.dumps([sglang_response(experts, 5)]))
    trace = read("routed-experts", path, num_experts=EXPERTS, top_k=TOP_K)
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.experts, experts)
    with pytest.raises(UsageError, match="experts a token uses"):
        read("routed-experts", path, num_experts=EXPERTS)
    with pytest.raises(BadFileError, match="do not divide"):
        read("routed-experts", path, num_experts=EXPERTS, top_k=4)


def test_vllm_load_is_summed_over_ranks(tmp_path):
    a, b, c = (load_of(routing(seed)) for seed in range(3))
    write_lines(
        tmp_path / "expert-load-dp_rank0-x.jsonl",
        [*vllm_load_lines(a, 1), *vllm_load_lines(b, 2), *vllm_load_lines(a + b, 1, "interval")],
    )
    write_lines(
        tmp_path / "expert-load-dp_rank1-y.jsonl", [*vllm_load_lines(c, 1), *vllm_load_lines(c, 2)]
    )
    record = read("vllm-load", tmp_path)
    assert isinstance(record, LoadRecord)
    np.testing.assert_array_equal(record.load, [a + c, b + c])
    assert record.layer_ids.tolist() == MOE_LAYERS


def test_vllm_load_leaves_out_what_was_cut_off(tmp_path):
    a, b = load_of(routing(0)), load_of(routing(1))
    path = write_lines(tmp_path / "x.jsonl", [*vllm_load_lines(a, 1), *vllm_load_lines(b, 2)])
    path.write_text(path.read_text()[:-20])
    recorded = RECORD_FORMATS["vllm-load"].read(path, Hints())
    assert isinstance(recorded.content, LoadRecord)
    np.testing.assert_array_equal(recorded.content.load, [a])
    assert recorded.warnings == [
        "the last line of x.jsonl is cut short, left out",
        "1 window lacks some layer, left out",
    ]


def test_vllm_load_takes_the_last_of_cumulative_reports(tmp_path):
    a, b = load_of(routing(0)), load_of(routing(1))
    later = [{**line, "step_end": 9} for line in vllm_load_lines(a + b, 1, "interval")]
    path = write_lines(tmp_path / "x.jsonl", [*vllm_load_lines(a, 1, "interval"), *later])
    record = read("vllm-load", path)
    assert isinstance(record, LoadRecord)
    np.testing.assert_array_equal(record.load, [a + b])


def tensorrt_folder(path: Path, ranks: list[dict[str, np.ndarray]], name: str = "rank") -> Path:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    path.mkdir(exist_ok=True)
    (path / "meta_info.json").write_text(
        json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K})
    )
    for rank, tables in enumerate(ranks):
        save_file(tables, path / f"{name}{rank}.safetensors")
    return path


def test_tensorrt_llm_is_summed_over_ranks(tmp_path):
    ranks = [
        {
            f"{50 + i}_{layer}": load_of(routing(10 * rank + i))[row]
            for i in range(2)
            for row, layer in enumerate(MOE_LAYERS)
        }
        for rank in range(2)
    ]
    record = read("tensorrt-llm", tensorrt_folder(tmp_path / "s", ranks))
    assert isinstance(record, LoadRecord)
    expected = [load_of(routing(i)) + load_of(routing(10 + i)) for i in range(2)]
    np.testing.assert_array_equal(record.load, expected)
    assert record.layer_ids.tolist() == MOE_LAYERS


def test_tensorrt_llm_raw_data_is_a_trace(tmp_path):
    def of_rank(rank: int) -> dict[str, np.ndarray]:
        return {
            f"{50 + i}_{layer}": np.ascontiguousarray(routing(10 * rank + i)[:, row]).astype("i4")
            for i in range(2)
            for row, layer in enumerate(MOE_LAYERS)
        }

    folder = tensorrt_folder(tmp_path / "s", [{"50_1": np.zeros(EXPERTS, "i8")}])
    tensorrt_folder(folder, [of_rank(0), of_rank(1), of_rank(0)], "token_selected_experts_rank")
    trace = read("tensorrt-llm", folder)
    assert isinstance(trace, Trace)
    parts = [routing(0), routing(1), routing(10), routing(11)]  # rank 2 saw what rank 0 saw
    np.testing.assert_array_equal(trace.experts, np.concatenate(parts))
    assert trace.home is not None
    assert trace.home.tolist() == [0] * 24 + [1] * 24
    assert trace.step is not None
    assert trace.step.tolist() == ([50] * 12 + [51] * 12) * 2


def omni_folder(path: Path, steps: dict[int, np.ndarray], num_ranks: int) -> Path:
    path.mkdir()
    for step, load in steps.items():
        for rank, part in enumerate(np.split(load, num_ranks, axis=1)):
            text = "".join("".join(f"{n}\t" for n in row) + "\n" for row in part.tolist())
            (path / f"activation_counts_recordstep_{step}_rank_{rank}.txt").write_text(text)
    return path


def test_omni_infer_is_put_together_from_its_ranks(tmp_path):
    steps = {9: load_of(routing(0)), 10: load_of(routing(1))}
    folder = omni_folder(tmp_path / "decoder", steps, 4)
    record = read("omni-infer", folder, layer_ids=(3, 4))
    assert isinstance(record, LoadRecord)
    np.testing.assert_array_equal(record.load, [steps[9], steps[10]])
    assert record.layer_ids.tolist() == [3, 4]
    (folder / "activation_counts_recordstep_10_rank_2.txt").unlink()
    record = read("omni-infer", folder)
    np.testing.assert_array_equal(record.load, [steps[9]])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".tsv", ".pt", ".safetensors"])
def test_a_matrix_of_load_is_read_from_every_kind_of_file(tmp_path, suffix):
    load = with_dense(load_of(routing()), 0)
    path = tmp_path / f"load{suffix}"
    if suffix == ".npy":
        np.save(path, load)
    elif suffix == ".npz":
        np.savez(path, load=load)
    elif suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save(torch.tensor(load), path)
    elif suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file({"load": load}, path)
    else:
        np.savetxt(path, load, fmt="%d", delimiter="," if suffix == ".csv" else "\t")
    record = read("vllm-ascend" if suffix == ".pt" else "matrix", path)
    assert isinstance(record, LoadRecord)
    np.testing.assert_array_equal(record.load, [load[1:]])
    assert record.layer_ids.tolist() == MOE_LAYERS
    named = read("matrix", path, layer_ids=(0, 4, 9))
    assert named.layer_ids.tolist() == [0, 4, 9]


def test_a_table_of_tokens_is_a_trace(tmp_path):
    experts = routing(2, 6)
    lines = ["request,position,layer,expert,weight,phase,label"]
    for token in range(6):
        for row, layer in enumerate(MOE_LAYERS):
            for k in range(TOP_K):
                phase, expert = ("prefill", "decode")[token % 3 == 2], experts[token, row, k]
                lines.append(f"{token // 3},{token % 3},{layer},{expert},{0.5 + k},{phase},code")
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    trace = read("table", path, num_experts=EXPERTS)
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.experts, experts)
    assert trace.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.phase.tolist() == [0, 0, 1, 0, 0, 1]
    assert trace.weights is not None
    assert trace.weights[0, 0].tolist() == [0.5, 1.5]
    assert trace.labels == {0: "code", 1: "code"}


def test_a_table_without_tokens_is_load(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    experts = routing(2, 6)
    layer = np.broadcast_to(np.array(MOE_LAYERS)[None, :, None], experts.shape).reshape(-1)
    table = pa.table({"layer": layer, "expert": experts.reshape(-1)})
    pq.write_table(table, tmp_path / "t.parquet")
    record = read("table", tmp_path / "t.parquet")
    assert isinstance(record, LoadRecord)
    np.testing.assert_array_equal(record.load, [load_of(experts)])
    (tmp_path / "t.csv").write_text("window,layer,expert,count\n0,1,0,5\n0,1,1,2\n1,1,1,4\n")
    record = read("table", tmp_path / "t.csv", num_experts=3)
    np.testing.assert_array_equal(record.load, [[[5, 2, 0]], [[0, 4, 0]]])


# what is damaged


class Danger:
    """What a malicious file would run when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"logical_count": Danger()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"logical_count": Danger()}))
    np.save(tmp_path / "c.npy", np.array([Danger()], object), allow_pickle=True)
    for name, file in (("sglang", "a.pt"), ("sglang", "b.pt"), ("matrix", "c.npy")):
        with pytest.raises(BadFileError):
            read(name, tmp_path / file)
    assert not (tmp_path / "pwned").exists()


def good_files(folder: Path) -> dict[str, tuple[Path, dict[str, object]]]:
    """A sound file for every format that is one file; format -> path, hints."""
    torch = pytest.importorskip("torch")
    load = with_dense(load_of(routing()), 0)
    torch.save(
        {"rank": 0, "logical_count": torch.tensor(load[None])}, folder / "expert_distribution.pt"
    )
    write_lines(folder / "routed.jsonl", [vllm_response(routing(), 5)])
    write_lines(folder / "load.jsonl", vllm_load_lines(load_of(routing()), 1))
    torch.save(torch.tensor(load), folder / "ascend.pt")
    np.save(folder / "load.npy", load)
    (folder / "t.csv").write_text("token,layer,expert\n0,1,0\n0,2,1\n")
    return {
        "sglang": (folder / "expert_distribution.pt", {}),
        "routed-experts": (folder / "routed.jsonl", {"num_experts": EXPERTS}),
        "vllm-load": (folder / "load.jsonl", {}),
        "vllm-ascend": (folder / "ascend.pt", {}),
        "matrix": (folder / "load.npy", {}),
        "table": (folder / "t.csv", {}),
    }


@pytest.mark.parametrize("name", list(RECORD_FORMATS))
def test_missing_empty_truncated_and_foreign_files_are_refused_with_one_line(tmp_path, name):
    with pytest.raises(BadFileError):
        read(name, tmp_path / "missing", num_experts=EXPERTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFileError):
        read(name, tmp_path / "empty", num_experts=EXPERTS)
    files = good_files(tmp_path)
    if name not in files:
        return
    path, hints = files[name]
    read(name, path, **hints)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x00\xff" * 40, b"[1, 2"):
        path.write_bytes(damaged)
        if name in ("table", "vllm-load") and damaged == whole[: len(whole) // 2]:
            continue  # files of lines: half of one is one
        with pytest.raises(PlacerError) as caught:
            read(name, path, **hints)
        assert caught.value.exit_code == 5, damaged
        assert "\n" not in caught.value.message
        assert str(path) in caught.value.message


def test_damaged_folders_are_refused(tmp_path):
    sound = {"5_1": np.ones(EXPERTS, "i8"), "5_2": np.ones(EXPERTS, "i8")}
    folder = tensorrt_folder(tmp_path / "a", [sound])
    (folder / "rank1.safetensors").write_bytes((folder / "rank0.safetensors").read_bytes()[:60])
    with pytest.raises(BadFileError, match="rank1"):
        read("tensorrt-llm", folder)
    with pytest.raises(BadFileError, match="expected 8"):
        read("tensorrt-llm", tensorrt_folder(tmp_path / "b", [{"5_1": np.ones(3, "i8")}]))
    with pytest.raises(BadFileError, match="iteration 6 has no layer 2"):
        read("tensorrt-llm", tensorrt_folder(tmp_path / "c", [{**sound, "6_1": sound["5_1"]}]))
    (folder / "meta_info.json").write_text("{")
    with pytest.raises(BadFileError, match="meta_info"):
        read("tensorrt-llm", folder)
    omni = omni_folder(tmp_path / "d", {1: load_of(routing())}, 2)
    (omni / "activation_counts_recordstep_1_rank_1.txt").write_text("1\t2\n3\n")
    with pytest.raises(BadFileError, match="differ in length"):
        read("omni-infer", omni)


def test_sglang_slots_out_of_range_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    record = per_token_record(torch, routing(0, 2), [0, 1], [2], 1, 10)
    record["topk_ids_of_layer"][1, 0, 2] = SLOTS  # a fused shared expert
    path = tmp_path / "x.pt"
    torch.save({"records": [record], "last_physical_to_logical_map": torch.tensor(MAP)}, path)
    with pytest.raises(BadFileError, match="slot 10 of 10"):
        read("sglang", path)


def test_hints_that_contradict_the_file_are_refused(tmp_path):
    np.save(tmp_path / "load.npy", load_of(routing()))
    with pytest.raises(UsageError, match="about 8 experts"):
        read("matrix", tmp_path / "load.npy", num_experts=16)
    with pytest.raises(UsageError, match="names 3 layers"):
        read("matrix", tmp_path / "load.npy", layer_ids=(1, 2, 3))


# the whole import


def test_an_import_writes_a_trace_or_a_load_record_or_nothing(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [vllm_response(routing(), 5)])
    hints = Hints(num_experts=EXPERTS)
    import_records(path, tmp_path / "trace", record_format="routed-experts", hints=hints)
    np.testing.assert_array_equal(open_trace(tmp_path / "trace").read().experts, routing())
    np.save(tmp_path / "load.npy", load_of(routing()))
    import_records(tmp_path / "load.npy", tmp_path / "load.npz", record_format="matrix")
    np.testing.assert_array_equal(read_load(tmp_path / "load.npz").load, [load_of(routing())])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match="exists already"):
        import_records(tmp_path / "load.npy", tmp_path / "load.npz", record_format="matrix")
    with pytest.raises(UsageError, match="no format"):
        import_records(path, tmp_path / "new", record_format="nonsense")
    (tmp_path / "r.jsonl").write_text("{")
    with pytest.raises(BadFileError):
        import_records(path, tmp_path / "new", record_format="routed-experts", hints=hints)
    assert sorted(tmp_path.iterdir()) == before

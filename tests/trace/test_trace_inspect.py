import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from trace_cases import random_trace, traces, unhurried

from placer.errors import BadFileError
from placer.trace import (
    ModelDims,
    Trace,
    TraceWriter,
    inspect_trace,
    make_trace,
    open_trace,
    write_npz,
    write_trace,
)


@unhurried
@given(traces())
def test_the_document_is_json_and_agrees_with_the_trace(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    folder = tmp_path_factory.mktemp("inspect")
    write_npz(trace, folder / "a.npz")
    write_trace(trace, folder / "t")
    for path in (folder / "a.npz", folder / "t"):
        found = json.loads(json.dumps(inspect_trace(path), allow_nan=False))
        used = (trace.experts >= 0).sum(axis=2)
        assert found["kind"] == "trace"
        assert found["complete"]
        assert found["sound"]
        assert found["tokens"] == trace.num_tokens
        assert found["requests"] == trace.requests().size
        assert found["layer_ids"] == trace.layer_ids.tolist()
        assert found["experts_used"]["min"] == used.min()
        assert found["experts_used"]["max"] == used.max()
        assert found["experts_used"]["mean"] == pytest.approx(used.mean())
        assert found["phases"] == {
            "prefill": int((trace.phase == 0).sum()),
            "decode": int((trace.phase == 1).sum()),
        }
        assert found["steps"] == (None if trace.step is None else np.unique(trace.step).size)
        assert sum(entry["requests"] for entry in found["labels"].values()) == len(trace.labels)
        assert found["bytes_on_disk"] > 0
        assert found["fingerprint"] == open_trace(path).fingerprint()
        assert found["problems"] == []


def test_labels_count_requests_and_tokens(tmp_path: Path) -> None:
    trace = make_trace(
        experts=np.zeros((6, 1, 1), int),
        num_experts=1,
        request=[0, 0, 1, 2, 2, 3],
        labels=["b", "a", "b", ""],
    )
    write_trace(trace, tmp_path / "t")
    found = inspect_trace(tmp_path / "t")["labels"]
    assert found == {"a": {"requests": 1, "tokens": 1}, "b": {"requests": 2, "tokens": 4}}
    assert list(found) == ["a", "b"]


def test_a_native_trace_tells_its_parts_ranks_and_source(tmp_path: Path) -> None:
    trace = random_trace(model=ModelDims("m", 4, 5, 6.0))
    for rank in (0, 2):
        with TraceWriter(
            tmp_path / "t",
            num_experts=8,
            layer_ids=trace.layer_ids,
            top_k=2,
            model=trace.model,
            step=False,
            rank=rank,
            part_tokens=20,
            source={"prompts": "p.txt"},
        ) as writer:
            writer.append_trace(trace)
    found = inspect_trace(tmp_path / "t")
    assert (found["parts"], found["ranks"]) == (6, [0, 2])
    assert found["source"] == {"prompts": "p.txt"}
    assert found["model"]["expert_flops_per_token"] == 6.0
    assert "several tokens at one position" in found["warnings"][0]
    assert found["bytes_on_disk"] == sum(path.stat().st_size for path in (tmp_path / "t").iterdir())


def test_an_unfinished_trace_is_said_to_be_so(tmp_path: Path) -> None:
    write_trace(random_trace(), tmp_path / "t")
    (tmp_path / "t" / "closed-0.json").unlink()
    found = inspect_trace(tmp_path / "t")
    assert not found["complete"]
    assert found["sound"]
    assert "rank 0 is unfinished" in found["warnings"][0]


def test_a_page_that_fails_its_checksum_is_a_problem(tmp_path: Path) -> None:
    write_trace(random_trace(), tmp_path / "t")
    part = tmp_path / "t" / "part-0-00000.parquet"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 4] ^= 0xFF
    part.write_bytes(damaged)
    found = inspect_trace(tmp_path / "t")
    assert not found["sound"]
    assert "part-0-00000.parquet" in found["problems"][0]
    assert found["fingerprint"] is None
    assert found["experts_used"] is None
    json.dumps(found)


def test_a_file_that_cannot_be_opened_raises(tmp_path: Path) -> None:
    with pytest.raises(BadFileError):
        inspect_trace(tmp_path / "none")


def warnings_of(tmp_path: Path, **arrays: object) -> str:
    write_trace(make_trace(**arrays), tmp_path / "t")  # type: ignore[arg-type]
    return "; ".join(inspect_trace(tmp_path / "t")["warnings"])


def test_token_layers_without_experts_are_mentioned(tmp_path: Path) -> None:
    assert "1 token-layers use no expert" in warnings_of(
        tmp_path, experts=[[[0, 1]], [[-1, -1]]], num_experts=2
    )


def test_an_implausible_number_of_experts_is_mentioned(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).integers(0, 8, (100, 2, 1))
    assert "no expert above 7" in warnings_of(tmp_path, experts=experts, num_experts=64)


def test_a_layer_that_never_varies_is_mentioned(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).integers(0, 8, (100, 2, 1))
    experts[:, 1] = 3
    found = warnings_of(tmp_path, experts=experts, num_experts=8, layer_ids=[4, 9])
    assert "the same experts in layers [9]" in found

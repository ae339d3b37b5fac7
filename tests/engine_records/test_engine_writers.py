"""Files that the engines' own released code writes, read back.

`make test-engines` unpacks the packages into .venv-engines/packages; elsewhere these are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from placer.engines.records import RECORD_FORMATS, Hints
from placer.trace import Trace
from placer.trace.load import LoadRecord
from tests.engine_records.files import (
    EXPERTS,
    LAYERS,
    MOE_LAYERS,
    TOP_K,
    load_of,
    routing,
    sglang_response,
    with_dense,
)
from tests.engine_records.sglang_code import encode_routed_experts, recorder_module

pytestmark = pytest.mark.engines

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(os.environ.get("PLACER_ENGINE_PACKAGES", ROOT / ".venv-engines" / "packages"))
SLOTS_PER_RANK = 5
MAP = np.stack(
    [np.r_[np.random.default_rng(i).permutation(EXPERTS), [3, 5]] for i in range(LAYERS)]
)


@pytest.fixture(autouse=True, scope="module")
def packages() -> Path:
    if not (PACKAGES / "sglang").is_dir():
        pytest.skip(f"no package sglang in {PACKAGES}: make test-engines")
    pytest.importorskip("torch")
    return PACKAGES


@pytest.fixture(scope="module")
def one_process_group(tmp_path_factory):
    """SGLang sums over ranks; here there is one."""
    import torch

    rendezvous = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def slots_of(experts: np.ndarray, layer: int) -> np.ndarray:
    """[tokens, TOP_K] the first slot that holds each expert."""
    return np.argsort(MAP[layer, :EXPERTS])[experts]


def record(
    packages: Path, folder: Path, passes: list[dict[str, Any]], *, rank: int = 0, **settings: Any
) -> None:
    """Let SGLang's recorder see some forward passes and dump them into `folder`."""
    import torch

    old = os.environ.get("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR")
    os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = str(folder)
    try:
        with recorder_module(packages, **settings) as module:
            metadata = SimpleNamespace(
                num_layers=LAYERS,
                num_physical_experts=MAP.shape[1],
                num_local_physical_experts=SLOTS_PER_RANK,
                num_logical_experts=EXPERTS,
                physical_to_logical_map=torch.tensor(MAP),
                ep_size=2,
            )
            recorder = module.ExpertDistributionRecorder.init_new(metadata, rank)
            recorder.start_record()
            for number, one in enumerate(passes):
                batch = SimpleNamespace(
                    input_ids=torch.zeros(len(one["positions"]), dtype=torch.int64),
                    positions=torch.tensor(one["positions"]),
                    extend_seq_lens_cpu=one["lengths"],
                    forward_mode=module.ForwardMode[one["mode"]],
                )
                with recorder.with_forward_pass(100 + number, batch):
                    for row, layer in enumerate(MOE_LAYERS):
                        with recorder.with_current_layer(layer):
                            slots = slots_of(one["experts"][:, row], layer)
                            if settings["expert_distribution_recorder_mode"] == "stat_approx":
                                counts = np.bincount(slots.reshape(-1), minlength=MAP.shape[1])
                                here = slice(rank * SLOTS_PER_RANK, (rank + 1) * SLOTS_PER_RANK)
                                recorder.on_deepep_dispatch_normal(
                                    counts[here].tolist(), None, None, None
                                )
                            else:
                                recorder.on_select_experts(torch.tensor(slots))
            recorder.stop_record()
            recorder._accumulator._first_dump = False  # it would empty the cache of a GPU
            recorder.dump_record()
    finally:
        if old is None:
            del os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"]
        else:
            os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = old


def two_passes() -> list[dict[str, Any]]:
    """A prefill of two prompts and a decode of both."""
    experts = routing(3, 9)
    return [
        {
            "mode": "EXTEND",
            "positions": [0, 1, 2, 3, 0, 1, 2],
            "lengths": [4, 3],
            "experts": experts[:7],
        },
        {"mode": "DECODE", "positions": [4, 3], "lengths": None, "experts": experts[7:]},
    ]


@pytest.mark.usefixtures("one_process_group")
def test_sglang_stat(packages, tmp_path):
    record(packages, tmp_path, two_passes(), expert_distribution_recorder_mode="stat")
    found = RECORD_FORMATS["sglang"].read(tmp_path, Hints()).content
    assert isinstance(found, LoadRecord)
    np.testing.assert_array_equal(found.load, [load_of(one["experts"]) for one in two_passes()])
    assert found.layer_ids.tolist() == MOE_LAYERS


@pytest.mark.usefixtures("one_process_group")
def test_sglang_stat_approx(packages, tmp_path):
    """A rank's file holds what its own slots received; all-reduce makes it whole in a cluster."""
    passes = two_passes()
    record(
        packages,
        tmp_path,
        passes,
        expert_distribution_recorder_mode="stat_approx",
        moe_a2a_backend="deepep",
        deepep_mode="normal",
    )
    found = RECORD_FORMATS["sglang"].read(tmp_path, Hints()).content
    assert isinstance(found, LoadRecord)
    expected = np.zeros((2, len(MOE_LAYERS), EXPERTS), int)
    for number, one in enumerate(passes):
        for row, layer in enumerate(MOE_LAYERS):
            slots = slots_of(one["experts"][:, row], layer).reshape(-1)
            for slot in slots[slots < SLOTS_PER_RANK]:
                expected[number, row, MAP[layer, slot]] += 1
    np.testing.assert_array_equal(found.load, expected)


def test_sglang_per_pass(packages, tmp_path):
    for rank in range(2):
        record(
            packages,
            tmp_path,
            two_passes(),
            rank=rank,
            expert_distribution_recorder_mode="per_pass",
        )
    found = RECORD_FORMATS["sglang"].read(tmp_path, Hints()).content
    assert isinstance(found, LoadRecord)
    once = np.array([load_of(one["experts"]) for one in two_passes()])
    np.testing.assert_array_equal(found.load, 2 * once)


def test_sglang_per_token(packages, tmp_path):
    for rank in range(2):  # tensor parallelism: both see the same tokens
        record(
            packages,
            tmp_path,
            two_passes(),
            rank=rank,
            expert_distribution_recorder_mode="per_token",
        )
    found = RECORD_FORMATS["sglang"].read(tmp_path, Hints()).content
    assert isinstance(found, Trace)
    np.testing.assert_array_equal(found.experts, routing(3, 9))
    assert found.request.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 1]
    assert found.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 3]
    assert found.phase.tolist() == [0] * 7 + [1] * 2
    assert found.step is not None
    assert found.step.tolist() == [100] * 7 + [101] * 2


def test_sglang_routed_experts(packages, tmp_path):
    import torch

    experts = routing(0, 9)
    response = sglang_response(experts, 5)
    hidden = torch.tensor(with_dense(experts, 0, axis=1), dtype=torch.int32)
    (response["meta_info"]["routed_experts"],) = encode_routed_experts(packages, [hidden])
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps(response) + "\n")
    hints = Hints(num_experts=EXPERTS, top_k=TOP_K)
    found = RECORD_FORMATS["routed-experts"].read(path, hints).content
    assert isinstance(found, Trace)
    np.testing.assert_array_equal(found.experts, experts)

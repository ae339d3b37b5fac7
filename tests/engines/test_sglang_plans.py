"""SGLang's own code loads what placer writes for it, and placer reads what SGLang makes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from engine_plans.cases import hints_of, random_plan

from placer.engines.registry import ENGINES, ExportOptions, PlanHints
from placer.plan import Plan

from .released import released

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch")

NUM_LAYERS = 9
FORMATS = list(ENGINES["sglang"].plan_formats())


@pytest.fixture
def server():
    """The settings of a server that is about to place its experts."""
    moe = SimpleNamespace(
        init_expert_location="trivial",
        ep_num_redundant_experts=0,
        moe_a2a_backend="deepep",
        ep_join_mode=None,
        ep_dispatch_algorithm="static",
        eplb_algorithm="auto",
    )
    parallel = SimpleNamespace(ep_size=4, nnodes=2, elastic_ep_initial_size=None, tp_size=4)
    return SimpleNamespace(moe=moe, parallel=parallel, num_experts=8)


@pytest.fixture
def sglang(monkeypatch, server) -> ModuleType:
    """`sglang.srt.eplb.expert_location`, as released."""

    class Model:
        @staticmethod
        def get_model_config_for_expert_location(hf_config: object) -> object:
            return module.ModelConfigForExpertLocation(
                num_layers=NUM_LAYERS, num_logical_experts=server.num_experts, num_groups=1
            )

    module = released(
        monkeypatch,
        "sglang.srt.eplb.expert_location",
        {
            "sglang.srt.runtime_context": {
                "get_device": lambda: SimpleNamespace(device="cpu"),
                "get_exec": lambda: SimpleNamespace(moe=server.moe),
                "get_parallel": lambda: server.parallel,
                "get_resources": lambda: SimpleNamespace(expert_location_metadata=None),
            },
            "sglang.srt.model_loader": {"get_model_architecture": lambda config: (Model, "")},
            "sglang.srt.elastic_ep.elastic_ep": {"elastic_expanded_world_enabled": lambda: False},
        },
    )
    return module


def serve(sglang, server, plan: Plan, path: Path, rank: int):
    """What a rank of the server understands of the file."""
    placement = plan.placement
    server.num_experts = placement.num_experts
    server.parallel.ep_size = placement.num_ranks
    server.parallel.nnodes = placement.num_nodes
    slots = placement.physical_to_logical.shape[1]
    server.moe.ep_num_redundant_experts = slots - placement.num_experts
    server.moe.init_expert_location = str(path)
    model_config = SimpleNamespace(hf_config=None)
    return sglang.compute_initial_expert_location_metadata(model_config, moe_ep_rank=rank)


PLANS = {
    "with copies": random_plan(1),
    "without copies": random_plan(2, slots=2),
    "one node": random_plan(3, nodes=1),
    "many copies": random_plan(4, experts=6, ranks=2, slots=5),
    "one layer": random_plan(5, layers=1),
}


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.suffix)
@pytest.mark.parametrize("name", PLANS)
def test_sglang_understands_the_plan_as_it_is(sglang, server, kind, name, tmp_path):
    plan = PLANS[name]
    path = tmp_path / f"map{kind.suffix}"
    kind.write(plan, path, ExportOptions(num_layers=NUM_LAYERS))
    table = plan.placement.physical_to_logical
    server.moe.moe_a2a_backend = "none"  # all copies stay candidates, on every rank
    metadata = serve(sglang, server, plan, path, rank=0)
    assert metadata.num_layers == NUM_LAYERS
    assert metadata.num_local_physical_experts == plan.placement.slots_per_rank
    assert metadata.num_logical_experts == plan.placement.num_experts
    for row, layer in enumerate(plan.layer_ids):
        assert metadata.physical_to_logical_map[layer].tolist() == table[row].tolist()
        for expert in range(plan.placement.num_experts):
            slots = np.flatnonzero(table[row] == expert).tolist()
            assert metadata.logical_to_all_physical(layer, expert) == slots


@pytest.mark.parametrize("name", PLANS)
def test_sglang_sends_each_rank_to_a_copy_that_the_plan_has(sglang, server, name, tmp_path):
    plan = PLANS[name]
    path = tmp_path / "map.json"
    FORMATS[0].write(plan, path, ExportOptions(num_layers=NUM_LAYERS))
    table = plan.placement.physical_to_logical
    for rank in range(plan.placement.num_ranks):
        dispatch = serve(sglang, server, plan, path, rank).logical_to_rank_dispatch_physical_map
        for row, layer in enumerate(plan.layer_ids):
            chosen = table[row][dispatch[layer].numpy()]
            assert chosen.tolist() == list(range(plan.placement.num_experts))


def test_sglang_refuses_other_keys_which_placer_therefore_does_not_write(sglang, server, tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"physical_to_logical_map": [[0, 1]], "num_ranks": 2}')
    with pytest.raises(TypeError, match="num_ranks"):
        serve(sglang, server, random_plan(0), path, rank=0)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.suffix)
def test_placements_that_sglang_makes_are_read_back(sglang, server, kind, tmp_path):
    import json

    server.moe.ep_num_redundant_experts = 4
    server.moe.ep_dispatch_algorithm = None  # the static one would ask for the process's rank
    model_config = SimpleNamespace(hf_config=None)
    load = torch.rand(NUM_LAYERS, 8, generator=torch.Generator().manual_seed(0))
    for made in (
        sglang.ExpertLocationMetadata.init_trivial(model_config, moe_ep_rank=0),
        sglang.ExpertLocationMetadata.init_by_eplb(model_config, load),
    ):
        table = made.physical_to_logical_map_cpu
        path = tmp_path / f"theirs{kind.suffix}"
        if kind.suffix == ".pt":
            torch.save({"physical_to_logical_map": table}, path)
        else:
            path.write_text(json.dumps({"physical_to_logical_map": table.tolist()}))
        imported = kind.read(path, PlanHints(gpus=4))
        ours = imported.plan.placement.physical_to_logical
        assert ((ours == table.numpy()) | (ours == -1)).all()
        # what placer left away its rank holds already
        by_rank = ours.reshape(NUM_LAYERS, 4, 3)
        for (layer, rank, _), expert in zip(
            np.argwhere(by_rank < 0),
            table.numpy().reshape(by_rank.shape)[by_rank < 0],
            strict=True,
        ):
            assert expert in by_rank[layer, rank]


def test_results_of_the_eplb_that_sglang_ships_are_read_back(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    deepseek = released(monkeypatch, "sglang.srt.eplb.eplb_algorithms.deepseek", {})
    load = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    phy2log, log2phy, logcnt = deepseek.rebalance_experts(
        load, num_replicas=24, num_groups=4, num_nodes=2, num_gpus=8, enable_hierarchical=True
    )
    path = tmp_path / "eplb.safetensors"
    save_file(
        {name: tensor.long().contiguous() for name, tensor in
         (("phy2log", phy2log), ("log2phy", log2phy), ("logcnt", logcnt))},
        path,
    )  # fmt: skip
    kind = next(ENGINES["eplb"].plan_formats())
    ours = kind.read(path, PlanHints(gpus=8, nodes=2)).plan
    table = ours.placement.physical_to_logical
    assert ((table == phy2log.numpy()) | (table == -1)).all()
    if (table >= 0).all():
        again = tmp_path / "again.safetensors"
        kind.write(ours, again, ExportOptions())
        assert np.array_equal(
            kind.read(again, hints_of(ours)).plan.placement.physical_to_logical, table
        )

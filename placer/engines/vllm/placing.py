"""Serving a plan in vLLM, which has no option for one: PLACER_VLLM_PLAN=plan.json.

The plugin (`placer.engines.vllm.plugin`) calls `place_experts` in each of vLLM's processes. Without
the variable it does nothing. With it, workers take the plan before they load the model:

- without EPLB, a plan without copies decides which experts each rank loads, from the start. vLLM
  asks `ExpertMapManager` where an expert is, when it loads weights and when it runs them.
- with EPLB (`--enable-eplb`), the plan is what its policy answers. vLLM starts with experts in
  order and moves their weights to the plan at its first rearrangement; later ones move nothing.

Written against vLLM 0.32 (`model_executor/layers/fused_moe/expert_map_manager.py`,
`model_executor/layers/fused_moe/routed_experts.py`, `distributed/eplb/policy/default.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.plans.tables import full_table
from placer.engines.registry import ExportOptions
from placer.errors import UsageError
from placer.plan import Plan, read_plan

VARIABLE = "PLACER_VLLM_PLAN"
_MARK = "_placer_places"
_IN_ORDER_LOADERS = ("GptOssForCausalLM",)  # take a slice of the experts, whatever the map says
_MAPPED_BACKENDS = ("allgather_reducescatter", "naive")
_log = logging.getLogger("vllm.placer")


def place_experts(environment: Mapping[str, str]) -> None:
    """Let this process's worker place experts by the plan, if the environment names one.

    Raises:
        BadFileError: the plan cannot be read.
        InfeasibleError: it leaves slots empty.
    """
    path = environment.get(VARIABLE, "")
    if not path:
        return
    plan = read_plan(Path(path))
    full_table(plan, "vLLM", ExportOptions())  # refused before the server starts
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, _MARK):
        return
    setattr(WorkerWrapperBase, _MARK, True)
    earlier = vars(WorkerWrapperBase).get("load_model")

    def load_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        take_plan(plan, wrapper.vllm_config)
        if earlier is not None:
            return earlier(wrapper, *args, **kwargs)
        return wrapper.worker.load_model(*args, **kwargs)

    WorkerWrapperBase.load_model = load_model


def take_plan(plan: Plan, vllm_config: Any) -> None:
    """Make this worker's classes answer by the plan.

    Raises:
        UsageError: the server's settings do not fit the plan.
    """
    parallel = vllm_config.parallel_config
    if not parallel.enable_expert_parallel:
        raise UsageError(f"{VARIABLE} needs expert parallelism", "--enable-expert-parallel")
    if parallel.enable_eplb:
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

        answer_with_plan(DefaultEplbPolicy, plan)
        return
    architectures = getattr(vllm_config.model_config, "architectures", None) or []
    for name in set(_IN_ORDER_LOADERS) & set(architectures):
        raise UsageError(f"vLLM loads {name} with experts in order only", "--enable-eplb")
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    load_by_plan(RoutedExperts, plan)


def load_by_plan(routed_experts: Any, plan: Plan) -> None:
    """Let every MoE layer that the plan knows hold the experts that it gives to this rank."""
    plain = routed_experts.__init__

    def init(layer: Any, layer_name: str, *args: Any, **kwargs: Any) -> None:
        number = re.search(r"\.layers\.(\d+)\.", layer_name)
        layer_id = int(number[1]) if number else -1
        if layer_id in plan.layer_ids:
            set_map(kwargs["expert_map_manager"], plan, layer_id)
            _log.info("placer: layer %d holds the experts of the plan", layer_id)
        else:
            _log.warning("placer: %s is not in the plan; its experts are in order", layer_name)
        plain(layer, layer_name, *args, **kwargs)

    routed_experts.__init__ = init


def set_map(manager: Any, plan: Plan, layer_id: int) -> None:
    """Replace vLLM's map from an expert to its place on this rank.

    Raises:
        UsageError: the server has other ranks or experts than the plan, or a plan with copies, or a
            backend that finds an expert's rank without the map.
    """
    import torch

    placement = plan.placement
    config = manager.moe_parallel_config
    found = (manager.ep_size, manager.global_num_experts)
    if found != (placement.num_ranks, placement.num_experts):
        raise UsageError(
            f"vLLM has {found[0]} ranks and {found[1]} experts, the plan "
            f"{placement.num_ranks} and {placement.num_experts}",
            f"placer solve DIR --gpus {found[0]}",
        )
    table = full_table(plan, "vLLM", ExportOptions())[0].physical_to_logical
    copies = table.shape[1] - placement.num_experts
    if copies:
        raise UsageError(
            f"the plan holds {copies} copies per layer, which vLLM serves with EPLB only",
            f"--enable-eplb --eplb-config.num_redundant_experts {copies}",
        )
    if config.use_all2all_kernels and config.all2all_backend not in _MAPPED_BACKENDS:
        raise UsageError(
            f"the backend {config.all2all_backend} finds an expert's rank by its number",
            "--all2all-backend allgather_reducescatter, or --enable-eplb",
        )
    if manager.rocm_aiter_enabled or manager.num_fused_shared_experts:
        raise UsageError("AITER's kernels have a map of their own", "--enable-eplb")
    held = table[plan.layer_ids.index(layer_id)].reshape(manager.ep_size, -1)[manager.ep_rank]
    expert_map = torch.full_like(manager.expert_map, -1)
    expert_map[torch.from_numpy(held)] = torch.arange(held.size, dtype=expert_map.dtype)
    manager._expert_map = expert_map


def answer_with_plan(policy: Any, plan: Plan) -> None:
    """Let EPLB's policy answer with the plan, whatever the load."""
    table: NDArray[np.int64] = full_table(plan, "vLLM", ExportOptions())[0].physical_to_logical
    num_ranks, num_experts = plan.placement.num_ranks, plan.placement.num_experts
    expected = (len(plan.layer_ids), num_experts, table.shape[1], num_ranks)

    def rebalance_experts(
        cls: Any,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        import torch

        found = (*weight.shape[-2:], num_replicas, num_ranks)
        if found != expected:
            raise UsageError(
                "vLLM has {} MoE layers, {} experts, {} slots and {} ranks, the plan {}, {}, {} "
                "and {}".format(*found, *expected),
                f"--eplb-config.num_redundant_experts {expected[2] - num_experts}, or solve anew",
            )
        return torch.from_numpy(table.copy())

    policy.rebalance_experts = classmethod(rebalance_experts)

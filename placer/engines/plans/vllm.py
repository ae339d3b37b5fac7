"""A plan for placer's plugin in vLLM: placer's own file, checked against what vLLM can hold.

vLLM 0.32 has no option for a placement: experts lie in order (`--expert-placement-strategy linear`)
or dealt out (`round_robin`), and EPLB starts from that and computes its own
(`EplbState.build_initial_global_physical_to_logical_map`). The plugin
(`placer.engines.vllm.placing`) serves this file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from placer.engines.plans.tables import full_table
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import UsageError
from placer.plan import Plan, read_plan, write_plan


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".json"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """The plan in the file."""
    plan = read_plan(path)
    placement = plan.placement
    said = (hints.gpus, hints.nodes, hints.num_experts, hints.layer_ids)
    found = (placement.num_ranks, placement.num_nodes, placement.num_experts, plan.layer_ids)
    names = ("--gpus", "--nodes", "--num-experts", "--layer-ids")
    for name, theirs, ours in zip(names, said, found, strict=True):
        if theirs is not None and theirs != ours:
            raise UsageError(f"{name} {theirs} contradicts {path}, which is for {ours}")
    return ImportedPlan(plan)


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan without empty slots."""
    placement, notes = full_table(plan, "vLLM", options)
    write_plan(replace(plan, placement=placement), path, force=options.force)
    copies = placement.physical_to_logical.shape[1] - placement.num_experts
    eplb = f" --enable-eplb --eplb-config.num_redundant_experts {copies}" if copies else ""
    return [*notes, f"PLACER_VLLM_PLAN={path} vllm serve MODEL --enable-expert-parallel{eplb}"]


FORMAT = PlanFormat("plan for placer's plugin", ".json", recognises, read, write)

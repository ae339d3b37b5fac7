"""FastDeploy's `rearrange-experts.json`.

`RedundantExpertWorkload` (`fastdeploy/eplb/utils.py`) writes and loads it; FastDeploy's EPLB
(`eplb/experts_manager.py`) fills it with what `rebalance_experts` returned: the expert of each
slot, the slots of each expert padded with -1, and the number of copies, each with a row per hidden
layer. FastDeploy reports this file and computes placements itself: it has no option to serve one.
"""

from __future__ import annotations

import json
from pathlib import Path

from placer.engines.plans.hidden_layers import hidden_layer_table, plan_of_hidden_layers
from placer.engines.plans.tables import copies_of, integer_table, short, slots_of_experts
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError
from placer.files import atomic_path, load_json
from placer.plan import Plan

KEY = "ep_rank_to_expert_id_list"


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".json"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the file's table."""
    document = load_json(path, "FastDeploy redundant experts")
    if not isinstance(document, dict) or KEY not in document:
        raise BadFileError(
            f"{path} has no {KEY} (found {short(document)})",
            "is it FastDeploy's rearrange-experts.json?",
        )
    table = integer_table(document[KEY], f"{KEY} of {path}")
    imported = plan_of_hidden_layers(table, hints, path, "fastdeploy")
    counts = document.get("expert_in_rank_num_list")
    if counts is not None and counts != copies_of(table, int(table.max()) + 1).tolist():
        raise BadFileError(f"{path}: expert_in_rank_num_list does not count the copies in {KEY}")
    return imported


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as FastDeploy keeps it."""
    table, notes = hidden_layer_table(plan, "FastDeploy", options)
    num_experts = plan.placement.num_experts
    document = {
        KEY: table.tolist(),
        "expert_id_to_ep_rank_array": slots_of_experts(table, num_experts).tolist(),
        "expert_in_rank_num_list": copies_of(table, num_experts).tolist(),
    }
    with atomic_path(path, force=options.force) as temporary:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return [*notes, "FastDeploy has no option to serve it (docs/engines/fastdeploy.md)"]


FORMAT = PlanFormat("redundant experts", ".json", recognises, read, write)

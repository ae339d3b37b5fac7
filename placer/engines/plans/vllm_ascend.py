"""vllm-ascend's `expert_map_path`, JSON.

Checked against vllm-ascend 0.23.0, `vllm_ascend/eplb/core/eplb_utils.py`: `expert_file_to_tensor`
takes the lists of a layer as one tensor, so that all ranks need equally many experts, and
`init_eplb_config` maps an expert to its place in its rank's list. Layers are counted among the MoE
layers, from 0 (`moe_instance_id` in `ops/fused_moe`). The engine writes the same form to
`expert_map_record_path` (`eplb/adaptor/vllm_adaptor.py`, `_export_tensor_to_file`).
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from placer.engines.plans.tables import (
    chosen_rows,
    full_table,
    imported_plan,
    integer_table,
    integers,
    short,
)
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError
from placer.files import atomic_path, load_json
from placer.plan import Plan


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".json"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the file's lists."""
    document = load_json(path, "vllm-ascend expert map")
    layers = document.get("layer_list") if isinstance(document, dict) else None
    if not isinstance(layers, list) or not layers:
        raise BadFileError(
            f"{path} has no layer_list (found {short(document)})",
            "is it vllm-ascend's expert map?",
        )
    if document.get("moe_layer_count") != len(layers):
        raise BadFileError(
            f"{path} says moe_layer_count {short(document.get('moe_layer_count'))}, "
            f"and has {len(layers)} layers"
        )
    rows = [_lists(layer, f"layer {number} of {path}") for number, layer in enumerate(layers)]
    for number, lists in enumerate(rows):
        if len(lists) != len(rows[0]) or any(len(one) != len(rows[0][0]) for one in lists):
            raise BadFileError(
                f"layer {number} of {path} has another number of devices, or of experts on them, "
                "than the first"
            )
    table = integer_table([[*chain(*lists)] for lists in rows], str(path))
    chosen, layer_ids = chosen_rows(hints, len(table), str(path))
    return imported_plan(table[chosen], layer_ids, len(rows[0]), hints, path, "vllm-ascend")


def _lists(layer: Any, where: str) -> list[list[int]]:
    """Experts of each device, in the order of the file, as the engine takes them."""
    devices = layer.get("device_list") if isinstance(layer, dict) else None
    if not isinstance(devices, list) or not devices:
        raise BadFileError(f"{where} has no device_list (found {short(layer)})")
    return [
        integers(
            device.get("device_expert") if isinstance(device, dict) else None,
            f"device_expert of device {number} in {where}",
        )
        for number, device in enumerate(devices)
    ]


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as vllm-ascend loads it."""
    placement, notes = full_table(plan, "vllm-ascend", options)
    table = placement.physical_to_logical
    by_rank = table.reshape(placement.num_layers, placement.num_ranks, -1)
    document = {
        "moe_layer_count": placement.num_layers,
        "layer_list": [
            {
                "layer_id": number,
                "device_count": placement.num_ranks,
                "device_list": [
                    {"device_id": rank, "device_expert": experts}
                    for rank, experts in enumerate(ranks)
                ],
            }
            for number, ranks in enumerate(by_rank.tolist())
        ],
    }
    with atomic_path(path, force=options.force) as temporary:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return [*notes, f"serve with an expert-parallel group of {placement.num_ranks}"]


FORMAT = PlanFormat("expert map", ".json", recognises, read, write)

"""omni-infer's placement pattern, .npy.

`omni_planner/expert_mapping.py` (`_load_placement_pattern_with_validation`) wants [ranks, MoE
layers, experts] with 1 where a rank holds an expert; the shape must be (world_size,
max_moe_layer_num, experts). Within a rank, experts lie in increasing order
(`is_expert_on_current_rank`), and `cpp/placement_mapping.cpp` gives every rank the same number of
slots.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from placer.engines.plans.tables import chosen_rows, full_table, imported_plan
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError
from placer.files import atomic_path, nothing_at
from placer.plan import Plan


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".npy"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the pattern; experts of a rank in increasing order."""
    try:
        pattern = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise nothing_at(path) from None
    except Exception as error:  # of a damaged header: whatever numpy's parser of it raises
        first = (str(error) or repr(error)).splitlines()[0]
        raise BadFileError(f"{path} is not a readable .npy: {first}", "was it truncated?") from None
    if not isinstance(pattern, np.ndarray) or pattern.ndim != 3 or pattern.dtype.kind not in "iufb":
        raise BadFileError(f"{path} is no pattern [ranks, layers, experts] of numbers")
    if not pattern.size or not np.isin(pattern, (0, 1)).all():
        raise BadFileError(f"{path} holds something else than 0 and 1, or nothing")
    by_layer = pattern.astype(bool).transpose(1, 0, 2)  # [L, G, E]
    num_layers, num_ranks, _ = by_layer.shape
    unplaced = np.argwhere(~by_layer.any(axis=1))
    if unplaced.size:
        layer, expert = unplaced[0]
        raise BadFileError(f"{path}: no rank holds expert {expert} in layer {layer}")
    slots = int(by_layer.sum(axis=2).max())
    # true entries first, by increasing expert
    order = np.argsort(~by_layer, axis=2, kind="stable")[:, :, :slots]
    held = np.take_along_axis(by_layer, order, axis=2)
    table = np.where(held, order, -1).reshape(num_layers, num_ranks * slots)
    rows, layer_ids = chosen_rows(hints, num_layers, str(path))
    return imported_plan(table[rows], layer_ids, num_ranks, hints, path, "omni-infer")


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as omni-infer loads it."""
    placement, notes = full_table(plan, "omni-infer", options)
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    by_rank = placement.physical_to_logical.reshape(num_layers, num_ranks, -1)
    pattern = np.zeros((num_ranks, num_layers, placement.num_experts), np.int32)
    np.put_along_axis(pattern, by_rank.transpose(1, 0, 2), 1, axis=2)
    with atomic_path(path, force=options.force) as temporary, temporary.open("wb") as file:
        np.save(file, pattern)
    return [*notes, f"set max_moe_layer_num: {num_layers}, for {num_ranks} ranks"]


FORMAT = PlanFormat("placement pattern", ".npy", recognises, read, write)

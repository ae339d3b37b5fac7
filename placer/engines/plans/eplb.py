"""The tensors of DeepSeek's EPLB, as a .safetensors file.

`eplb.rebalance_experts` (github.com/deepseek-ai/EPLB, `eplb.py`) returns, and vLLM, SGLang and
others pass around:

| tensor | shape, int64 | |
| --- | --- | --- |
| phy2log | [layers, slots] | expert of each slot |
| log2phy | [layers, experts, most copies] | slots of each expert, padded with -1 |
| logcnt | [layers, experts] | copies of each expert |

The file's metadata say what the tensors do not: under `placer`, a JSON object with `num_ranks` and
`layer_ids` (one key: safetensors writes several in any order).
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.plans.tables import (
    chosen_rows,
    copies_of,
    full_table,
    imported_plan,
    integer_table,
    integers,
    needed_gpus,
    short,
    slots_of_experts,
)
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError, MissingExtraError
from placer.files import atomic_path, nothing_at
from placer.plan import Plan


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".safetensors"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the tensors."""
    arrays, metadata = _load(path)
    if "phy2log" not in arrays:
        raise BadFileError(
            f"{path} has no phy2log (found {', '.join(sorted(arrays)) or 'nothing'})",
            "is it a result of EPLB?",
        )
    table = integer_table(arrays["phy2log"], f"phy2log of {path}")
    said = _said(metadata, path)
    hints = PlanHints(
        hints.gpus or said.gpus, hints.nodes, hints.num_experts, hints.layer_ids or said.layer_ids
    )
    num_ranks = needed_gpus(hints, table.shape[1], str(path))
    rows, layer_ids = chosen_rows(hints, len(table), str(path))
    imported = imported_plan(table[rows], layer_ids, num_ranks, hints, path, "eplb")
    _check_agreement(table, arrays, path)
    return imported


def _check_agreement(table: NDArray[np.int64], arrays: dict[str, Any], path: Path) -> None:
    """Refuse a file whose other tensors contradict phy2log."""
    num_experts = int(table.max()) + 1
    if "logcnt" in arrays:
        counts = copies_of(table, num_experts)
        if not np.array_equal(arrays["logcnt"], counts):
            raise BadFileError(f"{path}: logcnt does not count the copies in phy2log")
    if "log2phy" in arrays:
        slots = arrays["log2phy"]
        expected = slots_of_experts(table, num_experts)
        fits = slots.ndim == 3 and slots.shape[:2] == expected.shape[:2]
        if not fits or slots.shape[2] < expected.shape[2]:
            raise BadFileError(f"{path}: log2phy has the shape {slots.shape}")
        # in any order within an expert; EPLB numbers copies by load
        width = expected.shape[2]
        if not np.array_equal(np.sort(slots)[..., -width:], np.sort(expected)) or (
            (np.sort(slots)[..., :-width] >= 0).any()
        ):
            raise BadFileError(f"{path}: log2phy does not name the slots in phy2log")


def _said(metadata: dict[str, str], path: Path) -> PlanHints:
    """What the metadata say; nothing where placer did not write the file."""
    if "placer" not in metadata:
        return PlanHints()
    try:
        said = json.loads(metadata["placer"])
        gpus, layer_ids = said["num_ranks"], integers(said["layer_ids"], f"layer_ids of {path}")
        integers([gpus], f"num_ranks of {path}")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFileError(f"the metadata of {path} cannot be read") from None
    if gpus < 1 or any(b <= a for a, b in pairwise([-1, *layer_ids])):
        raise BadFileError(f"the metadata of {path} make no sense: {short(said)}")
    return PlanHints(gpus=gpus, layer_ids=tuple(layer_ids))


def _load(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors", "trace") from None
    if not path.is_file():
        raise BadFileError(f"{path} is a folder") if path.is_dir() else nothing_at(path)
    try:
        with safe_open(path, framework="numpy") as file:
            keys = list(file.keys())
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(
            f"{path} is not a readable safetensors file: {error}", "was it truncated?"
        ) from None


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as EPLB would have returned it."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise MissingExtraError("safetensors", "trace") from None
    placement, notes = full_table(plan, "EPLB", options)
    table = placement.physical_to_logical
    arrays = {
        "phy2log": np.ascontiguousarray(table),
        "log2phy": slots_of_experts(table, placement.num_experts),
        "logcnt": copies_of(table, placement.num_experts),
    }
    said = {"num_ranks": placement.num_ranks, "layer_ids": list(plan.layer_ids)}
    with atomic_path(path, force=options.force) as temporary:
        save_file(arrays, temporary, {"placer": json.dumps(said)})
    return notes


FORMAT = PlanFormat("EPLB tensors", ".safetensors", recognises, read, write)

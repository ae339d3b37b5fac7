"""Expert ids of each rank, per layer, as JSON: the plainest form, for runtimes of one's own.

    {"3": [[0, 5, 9], [1, 2, 7]], "4": ...}

A list per rank under each layer's real number: what Megatron-Core calls `local_expert_indices`
(`megatron/core/transformer/moe/moe_layer.py`) and DeepSpeed derives from a rank's number
(`deepspeed/moe/layer.py`). Both place experts in order and have no option for another
placement; code that does place them needs these lists. Ranks may hold unequal numbers of experts.
"""

from __future__ import annotations

import json
from pathlib import Path

from placer.engines.plans.tables import imported_plan, integer_table, integers, short
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError, UsageError
from placer.files import atomic_path, load_json
from placer.plan import Plan


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".json"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the lists; shorter ones leave slots empty."""
    document = load_json(path, "rank lists")
    if not isinstance(document, dict) or not document:
        raise BadFileError(f"{path} is {short(document)}, expected lists by layer")
    if not all(key.isdecimal() and key.isascii() and len(key) < 10 for key in document):
        odd = next(key for key in document if not key.isdecimal())
        raise BadFileError(f"{path} has the key {short(odd)}, expected layer numbers")
    by_layer = {int(key): value for key, value in document.items()}
    layer_ids = hints.layer_ids or tuple(sorted(by_layer))
    missing = sorted(set(layer_ids) - set(by_layer))
    if missing:
        raise UsageError(f"--layer-ids names layer {missing[0]}, which {path} does not have")
    lists = [_lists(by_layer[layer], f"layer {layer} of {path}") for layer in layer_ids]
    num_ranks = len(lists[0])
    for layer, one in zip(layer_ids, lists, strict=True):
        if len(one) != num_ranks:
            raise BadFileError(
                f"layer {layer} of {path} has {len(one)} ranks, the first {num_ranks}"
            )
    slots = max(len(experts) for one in lists for experts in one)
    rows = [[e for x in one for e in (*x, *[-1] * (slots - len(x)))] for one in lists]
    table = integer_table(rows, str(path))
    return imported_plan(table, layer_ids, num_ranks, hints, path, "rank-lists")


def _lists(value: object, where: str) -> list[list[int]]:
    if not isinstance(value, list) or not value:
        raise BadFileError(f"{where} is {short(value)}, expected a list for each rank")
    lists = [
        [] if experts == [] else integers(experts, f"rank {rank} in {where}")
        for rank, experts in enumerate(value)
    ]
    if any(expert < 0 for experts in lists for expert in experts):
        raise BadFileError(f"{where} has a negative expert number")
    return lists


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as lists."""
    placement = plan.placement
    by_rank = placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_ranks, -1
    ).tolist()
    rows = [
        f'"{layer}": {json.dumps([[e for e in rank if e >= 0] for rank in ranks])}'
        for layer, ranks in zip(plan.layer_ids, by_rank, strict=True)
    ]
    with atomic_path(path, force=options.force) as temporary:
        temporary.write_text("{" + ",\n".join(rows) + "}\n", encoding="utf-8")
    return []


FORMAT = PlanFormat("expert ids of each rank", ".json", recognises, read, write)

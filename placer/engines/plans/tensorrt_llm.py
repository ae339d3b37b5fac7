"""TensorRT-LLM's MoE load balancer config, YAML.

`MoeLoadBalancerConfig` (`tensorrt_llm/llmapi/llm_args.py`) forbids keys other than `num_slots`,
`initial_global_assignments` and `layer_updates_per_iter`. The assignments are a list of `num_slots`
experts under each layer's real number (`get_layer_initial_global_assignments` raises where a MoE
layer is missing or its list has another length), and `setup` wants `num_slots` divisible by the
number of ranks. With `layer_updates_per_iter: 0` the placement stays as it is. Files for the
reports in `examples/wide_ep/ep_load_balancer` also have `ep_size`, which the engine refuses: placer
reads it and does not write it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from placer.engines.plans.tables import (
    full_table,
    imported_plan,
    integer_table,
    integers,
    needed_gpus,
    short,
)
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError, UsageError
from placer.files import atomic_path, nothing_at
from placer.plan import Plan

KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter", "ep_size")


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix in (".yaml", ".yml")


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the file, or of the balancer's part of a file of LLM options."""
    document = _load_yaml(path)
    if isinstance(document, dict) and isinstance(document.get("moe_config"), dict):
        document = document["moe_config"].get("load_balancer")
    if not isinstance(document, dict) or "initial_global_assignments" not in document:
        raise BadFileError(
            f"{path} has no initial_global_assignments (found {short(document)})",
            "is it TensorRT-LLM's MoE load balancer config?",
        )
    unknown = [str(key) for key in document if key not in KEYS]
    if unknown:
        raise BadFileError(f"{path} has {', '.join(unknown)}, which TensorRT-LLM refuses")
    assignments, num_slots = document["initial_global_assignments"], document.get("num_slots")
    if not isinstance(assignments, dict) or not assignments:
        raise BadFileError(
            f"initial_global_assignments of {path} is {short(assignments)}, expected lists by layer"
        )
    layer_ids = sorted(integers(list(assignments), f"the layers of {path}"))
    if layer_ids[0] < 0:
        raise BadFileError(f"{path} has a layer {layer_ids[0]}")
    if hints.layer_ids is not None and set(hints.layer_ids) - set(layer_ids):
        missing = min(set(hints.layer_ids) - set(layer_ids))
        raise UsageError(f"--layer-ids names layer {missing}, which {path} does not have")
    layer_ids = list(hints.layer_ids or layer_ids)
    table = integer_table([assignments[layer] for layer in layer_ids], f"the lists of {path}")
    if table.shape[1] != num_slots:
        raise BadFileError(
            f"{path} says num_slots {short(num_slots)}, its lists have {table.shape[1]} experts"
        )
    if hints.gpus is None and "ep_size" in document:
        (ep_size,) = integers([document["ep_size"]], f"ep_size of {path}")
        hints = replace(hints, gpus=max(1, ep_size))
    num_ranks = needed_gpus(hints, table.shape[1], str(path))
    return imported_plan(table, layer_ids, num_ranks, hints, path, "tensorrt-llm")


def _load_yaml(path: Path) -> Any:
    import yaml

    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise nothing_at(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).strip().splitlines()[0]
        raise BadFileError(f"{path} is not valid YAML: {first}", "was it truncated?") from None


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as TensorRT-LLM loads it."""
    placement, notes = full_table(plan, "TensorRT-LLM", options)
    table = placement.physical_to_logical
    lines = [
        f"num_slots: {table.shape[1]}",
        "layer_updates_per_iter: 0",
        "initial_global_assignments:",
        *(
            f"  {layer_id}: {row.tolist()}"
            for layer_id, row in zip(plan.layer_ids, table, strict=True)
        ),
    ]
    with atomic_path(path, force=options.force) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [*notes, f"serve with moe_expert_parallel_size {placement.num_ranks}"]


FORMAT = PlanFormat("MoE load balancer config", ".yaml", recognises, read, write)

"""Tables with a row per hidden layer, dense ones included, as SGLang and FastDeploy keep them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from placer.engines.plans.tables import (
    chosen_rows,
    full_table,
    imported_plan,
    needed_gpus,
)
from placer.engines.readers.common import ranges
from placer.engines.registry import ExportOptions, ImportedPlan, PlanHints
from placer.errors import UsageError
from placer.plan import Plan


def hidden_layer_table(
    plan: Plan, engine: str, options: ExportOptions
) -> tuple[NDArray[np.int64], list[str]]:
    """[hidden layers, S] the plan's rows at its layer ids; experts in order in the other rows.

    The engine needs a sound row for a dense layer too, and never looks at it.

    Raises:
        InfeasibleError: the placement has empty slots.
        UsageError: fewer hidden layers than the plan knows.
    """
    placement, notes = full_table(plan, engine, options)
    fewest = plan.layer_ids[-1] + 1
    if options.num_layers is not None and options.num_layers < fewest:
        raise UsageError(
            f"--num-layers {options.num_layers}, but the plan places layer {plan.layer_ids[-1]}",
            f"--num-layers {fewest}, or as many hidden layers as the model has",
        )
    num_layers = options.num_layers or fewest
    num_slots = placement.physical_to_logical.shape[1]
    table = np.tile(np.arange(num_slots) % placement.num_experts, (num_layers, 1))
    table[list(plan.layer_ids)] = placement.physical_to_logical
    others = sorted(set(range(num_layers)) - set(plan.layer_ids))
    if others:
        notes.append(f"layers {ranges(others)} are not in the plan; their experts are in order")
    if options.num_layers is None:
        notes.append(
            f"{num_layers} rows, for a model of {num_layers} hidden layers; "
            "if it has more: --num-layers"
        )
    return table, notes


def plan_of_hidden_layers(
    table: NDArray[np.int64], hints: PlanHints, path: Path, engine: str
) -> ImportedPlan:
    """A plan of such a table.

    Raises:
        BadFileError: no sound placement.
        UsageError: a hint is missing or does not fit.
    """
    num_ranks = needed_gpus(hints, table.shape[1], str(path))
    rows, layer_ids = chosen_rows(hints, len(table), str(path))
    imported = imported_plan(table[rows], layer_ids, num_ranks, hints, path, engine)
    in_order = np.arange(table.shape[1]) % imported.plan.placement.num_experts
    plain = (table[rows] == in_order).all(axis=1)
    dense = [layer for layer, is_plain in zip(layer_ids, plain, strict=True) if is_plain]
    if dense and len(dense) < len(rows):
        imported.warnings.append(
            f"layers {ranges(dense)} hold their experts in order, as the rows of dense layers do; "
            "--layer-ids names those that count"
        )
    return imported

"""What all kinds of plan share: the table of a placement, and what an engine cannot hold of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.registry import ExportOptions, ImportedPlan, PlanHints
from placer.errors import BadFileError, InfeasibleError, UsageError
from placer.placement import Placement
from placer.plan import Plan

MOST = 2**31 - 1


def full_table(plan: Plan, engine: str, options: ExportOptions) -> tuple[Placement, list[str]]:
    """The plan's placement without empty slots, for engines that know none.

    Where every rank leaves equally many slots empty in every layer, these are left away: the same
    experts on the same ranks. Where not, `options.fill_empty` asks for further copies.

    Raises:
        InfeasibleError: slots are empty, and nobody asked to fill them.
    """
    placement = plan.placement
    by_rank = placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_ranks, placement.slots_per_rank
    )
    empty = (by_rank < 0).sum(axis=2)
    if not empty.any():
        return placement, []
    if empty.min() == empty.max():
        kept = by_rank[by_rank >= 0].reshape(placement.num_layers, -1)
        slots = placement.slots_per_rank - int(empty[0, 0])
        note = f"each rank's {empty[0, 0]} empty slots are left away: {slots} slots per rank"
        return replace(placement, physical_to_logical=kept), [note]
    if options.fill_empty:
        filled = fill_empty_slots(placement)
        note = (
            f"{int(empty.sum())} empty slots hold further copies, of the experts that had fewest; "
            "the plan's figures do not count them"
        )
        return filled, [note]
    layer, rank = (int(axis[0]) for axis in np.nonzero(empty))
    raise InfeasibleError(
        f"{engine} knows no empty slots, and in layer {plan.layer_ids[layer]} rank {rank} leaves "
        f"{empty[layer, rank]} of {placement.slots_per_rank} empty ({int(empty.sum())} in all)",
        f"--fill-empty puts further copies there; or {_solve_full(placement)}",
    )


def _solve_full(placement: Placement) -> str:
    """The command that gives a plan without empty slots."""
    experts, ranks = placement.num_experts, placement.num_ranks
    slots = -(-experts // ranks)
    command = f"placer solve DIR --gpus {ranks} --slots-per-rank {slots}"
    return command if experts % ranks == 0 else f"{command} --dispatch alltoall, which uses them"


def fill_empty_slots(placement: Placement) -> Placement:
    """The same placement with a copy of some expert in every empty slot.

    Each slot gets the expert with the fewest copies in the layer that its rank does not hold yet;
    of equal ones the one with the smallest number.

    Raises:
        InfeasibleError: a rank has more slots than there are experts.
    """
    if placement.slots_per_rank > placement.num_experts:
        raise InfeasibleError(
            f"{placement.slots_per_rank} slots per rank cannot be filled with "
            f"{placement.num_experts} experts without holding one twice",
            f"placer solve DIR --slots-per-rank {placement.num_experts} or fewer",
        )
    table = placement.physical_to_logical.copy()
    for row in table:
        copies = np.bincount(row[row >= 0], minlength=placement.num_experts)
        for rank in row.reshape(placement.num_ranks, -1):  # a view: writes go to the table
            for slot in np.flatnonzero(rank < 0):
                price = copies.astype(float)
                price[rank[rank >= 0]] = np.inf
                expert = int(price.argmin())
                rank[slot] = expert
                copies[expert] += 1
    return replace(placement, physical_to_logical=table)


def copies_of(table: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """[L, E] copies of each expert in a table [L, S] without empty slots."""
    return np.stack([np.bincount(row, minlength=num_experts) for row in table])


def slots_of_experts(table: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """[L, E, C] slots of each expert, increasing, padded with -1; C = most copies of any."""
    counts = copies_of(table, num_experts)
    slots = np.full((*counts.shape, int(counts.max())), -1, np.int64)
    for layer, row in enumerate(table):
        order = np.argsort(row, kind="stable")
        first = np.cumsum(counts[layer]) - counts[layer]
        slots[layer, row[order], np.arange(row.size) - first[row[order]]] = order
    return slots


def integer_table(value: Any, where: str) -> NDArray[np.int64]:
    """[L, S] of a list of equally long lists of whole numbers, or of an array.

    Raises:
        BadFileError: anything else.
    """
    if isinstance(value, np.ndarray):
        if value.ndim != 2 or value.dtype.kind not in "iu" or not value.size:
            raise BadFileError(
                f"{where} is {value.dtype} of shape {value.shape}, expected whole numbers "
                "[layers, slots]"
            )
        return value.astype(np.int64)
    if not isinstance(value, list) or not value:
        raise BadFileError(f"{where} is {short(value)}, expected a list of rows")
    for number, row in enumerate(value):
        integers(row, f"row {number} of {where}")
        if len(row) != len(value[0]):
            raise BadFileError(
                f"row {number} of {where} has {len(row)} slots, row 0 has {len(value[0])}"
            )
    return np.array(value, np.int64)


def integers(value: Any, where: str) -> list[int]:
    """A list of whole numbers, at least one.

    Raises:
        BadFileError: anything else.
    """
    if not isinstance(value, list) or not value:
        raise BadFileError(f"{where} is {short(value)}, expected a list of expert numbers")
    for entry in value:
        if not isinstance(entry, int) or isinstance(entry, bool) or abs(entry) > MOST:
            raise BadFileError(f"{where} holds {short(entry)}, expected expert numbers")
    return value


def short(value: Any) -> str:
    """A value as a message can show it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def needed_gpus(hints: PlanHints, num_slots: int, where: str) -> int:
    """G, where the file does not say.

    Raises:
        UsageError: not said, or it does not divide the slots.
    """
    if hints.gpus is None:
        raise UsageError(f"{where} does not say how many ranks there are", "--gpus N")
    if num_slots % hints.gpus:
        raise UsageError(
            f"{where} has {num_slots} slots, which {hints.gpus} ranks cannot share evenly",
            "--gpus as the engine was started with",
        )
    return hints.gpus


def chosen_rows(hints: PlanHints, num_rows: int, where: str) -> tuple[list[int], tuple[int, ...]]:
    """Which rows of a file to keep, and their layer ids.

    A file with a row per hidden layer has rows for dense layers too: `hints.layer_ids` says which
    count. One with a row per MoE layer gets its layer ids from there.

    Raises:
        UsageError: the layer ids do not fit the rows.
    """
    ids = hints.layer_ids
    if ids is None:
        return list(range(num_rows)), tuple(range(num_rows))
    if len(ids) == num_rows:
        return list(range(num_rows)), ids
    if len(ids) < num_rows and ids[-1] < num_rows:
        return list(ids), ids
    raise UsageError(f"--layer-ids names {len(ids)} layers, {where} has {num_rows} rows")


def imported_plan(
    table: NDArray[np.int64],
    layer_ids: Sequence[int],
    num_ranks: int,
    hints: PlanHints,
    path: Path,
    engine: str,
) -> ImportedPlan:
    """A plan of a table [L, S] that an engine's file held.

    Some balancers put an expert on a rank twice, which serves no more than once does: the second
    slot is taken for an empty one, and a warning says so.

    Raises:
        BadFileError: no sound placement.
        UsageError: a hint does not fit.
    """
    if table.min() < -1:
        raise BadFileError(f"{path} holds expert {table.min()}")
    num_experts = int(table.max()) + 1
    if num_experts > table.shape[1]:
        raise BadFileError(
            f"{path} holds expert {num_experts - 1}, and has {table.shape[1]} slots per layer"
        )
    if hints.num_experts not in (None, num_experts):
        raise UsageError(f"--num-experts {hints.num_experts}, but {path} is about {num_experts}")
    if hints.gpus not in (None, num_ranks):
        raise UsageError(f"--gpus {hints.gpus}, but {path} is for {num_ranks} ranks")
    nodes = hints.nodes or 1
    if num_ranks % nodes:
        raise UsageError(f"{num_ranks} ranks cannot be spread evenly over {nodes} nodes")
    table, doubles = _without_doubles(table, num_ranks)
    placement = Placement(table, num_experts, num_ranks, num_ranks // nodes)
    unsound = placement.problems()
    if unsound:
        raise BadFileError(f"{path}: {unsound[0]}", "is it the file that the engine wrote?")
    warnings = (
        [f"{doubles} slots repeat an expert that their rank holds already, and count as empty"]
        if doubles
        else []
    )
    provenance = {"imported_from": path.name, "importer": engine}
    return ImportedPlan(Plan(placement, tuple(layer_ids), provenance=provenance), warnings)


def _without_doubles(table: NDArray[np.int64], num_ranks: int) -> tuple[NDArray[np.int64], int]:
    """The table with -1 where a rank repeats an expert, and how often."""
    by_rank = table.reshape(table.shape[0] * num_ranks, -1).copy()
    order = np.argsort(by_rank, axis=1, kind="stable")
    ordered = np.take_along_axis(by_rank, order, axis=1)
    repeats = np.zeros_like(by_rank, dtype=bool)
    np.put_along_axis(
        repeats,
        order[:, 1:],
        (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0),
        axis=1,
    )
    by_rank[repeats] = -1
    return by_rank.reshape(table.shape), int(repeats.sum())

"""`Plan`: a placement plus where it came from, what it promises and how good it provably is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from placer.errors import BadFileError
from placer.files import read_json, write_json
from placer.placement import Placement
from placer.trace.model import ModelDims

FORMAT = "placer.plan"
SCHEMA_VERSION = 1
_MADE_BY = "expected a plan: `placer solve` makes one, `placer import` one of an engine's file"

Dispatch = Literal["alltoall", "coherent", "allgather"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What `placer solve` writes and engines load.

    Attributes:
        placement: which expert sits where.
        layer_ids: [L] the model's own numbers of the MoE layers.
        model: dimensions of the model.
        dispatch: the dispatch model that it was made for.
        prediction: figures on tokens that it was not fitted to, with intervals.
        certificate: objective, value, lower bound, gap and status, on the tokens it was fitted to.
        provenance: inputs, split, seed, solver, settings, versions.
        timings: seconds; the only part that differs between two runs with one seed.
    """

    placement: Placement
    layer_ids: tuple[int, ...]
    model: ModelDims = field(default_factory=ModelDims)
    dispatch: Dispatch = "alltoall"
    prediction: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """The JSON object of the plan file."""
        placement = self.placement
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "model": asdict(self.model),
            "layer_ids": list(self.layer_ids),
            "num_experts": placement.num_experts,
            "num_ranks": placement.num_ranks,
            "ranks_per_node": placement.ranks_per_node,
            "slots_per_rank": placement.slots_per_rank,
            "physical_to_logical": placement.physical_to_logical.tolist(),
            "dispatch": self.dispatch,
            "prediction": self.prediction,
            "certificate": self.certificate,
            "provenance": self.provenance,
            "timings": self.timings,
        }


def write_plan(plan: Plan, path: Path, *, force: bool = False) -> None:
    """Write the plan file atomically; refuse to replace one unless forced."""
    write_json(path, plan.to_document(), force=force)


def read_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        BadFileError: not a plan, of a newer version, or unsound.
    """
    return plan_from_document(read_json(path, FORMAT, SCHEMA_VERSION, _MADE_BY), str(path))


def plan_from_document(document: dict[str, Any], where: str) -> Plan:
    """A plan from the JSON object of a plan file; `where` names it in messages."""
    from pydantic import ValidationError

    from placer.plan_schema import PlanDocument

    try:
        checked = PlanDocument.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BadFileError(
            f"{where}: {key}: {first['msg']} (found {_short(first['input'])})",
            "solve again, or mend the file",
        ) from None
    width = checked.num_ranks * checked.slots_per_rank
    rows = checked.physical_to_logical
    if len(rows) != len(checked.layer_ids):
        raise BadFileError(
            f"{where}: physical_to_logical has {len(rows)} rows, expected {len(checked.layer_ids)},"
            " one for each layer id"
        )
    for layer, row in enumerate(rows):
        if len(row) != width:
            raise BadFileError(
                f"{where}: row {layer} of physical_to_logical has {len(row)} slots, expected "
                f"{checked.num_ranks} ranks x {checked.slots_per_rank} = {width}"
            )
    if any(a >= b for a, b in zip(checked.layer_ids, checked.layer_ids[1:], strict=False)):
        raise BadFileError(f"{where}: layer_ids must increase")
    placement = Placement(
        np.array(rows, np.int64), checked.num_experts, checked.num_ranks, checked.ranks_per_node
    )
    unsound = placement.problems()
    if unsound:
        raise BadFileError(f"{where}: {unsound[0]}", "solve again, or mend the file")
    return Plan(
        placement=placement,
        layer_ids=tuple(checked.layer_ids),
        model=ModelDims(**checked.model.model_dump()),
        dispatch=checked.dispatch,
        prediction=checked.prediction,
        certificate=checked.certificate,
        provenance=checked.provenance,
        timings=checked.timings,
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

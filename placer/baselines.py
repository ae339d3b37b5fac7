"""Placements that a plan is compared with: by name, or from another plan file."""

from __future__ import annotations

from pathlib import Path

from placer.errors import UsageError
from placer.placement import Placement, contiguous_like
from placer.plan import Plan, read_plan


def baseline_placement(name: str, plan: Plan) -> Placement:
    """The placement called `name` for the same model and ranks as `plan`.

    Args:
        name: "contiguous", or the path of a plan file.
        plan: gives layers, experts, ranks and slots.

    Raises:
        UsageError: no such baseline, or a plan of another model.
        BadFileError: no plan lies there.
    """
    ours = plan.placement
    if name == "contiguous":
        return contiguous_like(ours)
    if Path(name).suffix == ".json" or Path(name).is_file():
        other = read_plan(Path(name))
        theirs = other.placement
        if (theirs.num_layers, theirs.num_experts) != (ours.num_layers, ours.num_experts):
            raise UsageError(
                f"{name} places {theirs.num_layers} layers x {theirs.num_experts} experts, "
                f"the plan {ours.num_layers} x {ours.num_experts}",
                "compare plans of one model",
            )
        if other.layer_ids != plan.layer_ids:
            raise UsageError(
                f"{name} places other layers than the plan: {list(other.layer_ids)}, not "
                f"{list(plan.layer_ids)}",
                "compare plans of one model",
            )
        return theirs
    raise UsageError(
        f"no baseline is called {name!r}",
        "contiguous, or the path of a plan file; other methods: placer solve --solver NAME",
    )

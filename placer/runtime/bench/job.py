"""What is to be measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placer.cluster import Cluster
from placer.errors import UsageError
from placer.placement import Placement
from placer.plan import Dispatch, Plan
from placer.tracer.prompts import Prompt


@dataclass(frozen=True)
class Way:
    """How tokens travel.

    Attributes:
        dispatch: the dispatch model.
        deduplicate_nodes: under `alltoall`, one copy of a token per other node.
    """

    dispatch: Dispatch
    deduplicate_nodes: bool = False

    @property
    def name(self) -> str:
        return "alltoall-by-node" if self.deduplicate_nodes else self.dispatch


@dataclass(frozen=True, eq=False)
class Arm:
    """A placement and a way of dispatch, one of those that are compared.

    Attributes:
        name: "plan", or that of a baseline; with the way in brackets where it has several.
        placement: where the experts are.
        way: how tokens travel.
    """

    name: str
    placement: Placement
    way: Way

    @property
    def placement_id(self) -> str:
        """The same for equal placements."""
        return _digest(self.placement.physical_to_logical.astype("<i8").tobytes())


@dataclass(frozen=True, eq=False)
class BenchJob:
    """What every rank of a run is told.

    Attributes:
        plan: the plan; the first arm.
        plan_name: for messages.
        arms: the plan and its baselines.
        folder: of the checkpoint.
        prompts: the requests.
        max_new_tokens: of each request; stop tokens are ignored, so that all arms do as much.
        batch_size: requests that run together.
        repeats: of every arm, in turn.
        warm_ups: of every arm before the first repeat; the first is recorded and replayed.
        cluster: what the cost model prices with; None to predict traffic and load only.
        dtype: "auto", float32, bfloat16 or float16.
        device: "auto", "cpu" or "cuda".
        output: folder of the repeats that are done; None to keep nothing.
    """

    plan: Plan
    plan_name: str
    arms: tuple[Arm, ...]
    folder: Path
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    batch_size: int
    repeats: int
    warm_ups: int = 1
    cluster: Cluster | None = None
    dtype: str = "auto"
    device: str = "auto"
    output: Path | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("there is nothing to generate from", "--prompts FILE or --prompt TEXT")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise UsageError(
                f"a baseline stands there twice: {', '.join(names)}", "name each --baseline once"
            )
        ours = self.plan.placement
        for arm in self.arms:
            shape = (arm.placement.num_ranks, arm.placement.ranks_per_node)
            if shape != (ours.num_ranks, ours.ranks_per_node):
                raise UsageError(
                    f"{arm.name} is for {shape[0]} ranks, {shape[1]} per node, the plan for "
                    f"{ours.num_ranks}, {ours.ranks_per_node} per node",
                    "compare plans for the same ranks",
                )

    def settings(self) -> dict[str, Any]:
        """What repeats must agree in to be put together; as JSON."""
        return {
            "model": self.folder.resolve().name,
            "dtype": self.dtype,
            "device": self.device,
            "num_ranks": self.plan.placement.num_ranks,
            "ranks_per_node": self.plan.placement.ranks_per_node,
            "requests": len(self.prompts),
            "requests_sha256": _digest(repr(self.prompts).encode()),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "arms": {arm.name: [arm.placement_id, arm.way.name] for arm in self.arms},
        }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

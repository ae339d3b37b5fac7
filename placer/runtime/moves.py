"""What must be loaded to go from one placement to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.placement import Placement


@dataclass(frozen=True, eq=False)
class Moves:
    """Copies of experts that ranks lack, and where they can be had.

    Attributes:
        expert_bytes: of one expert of one layer.
        same_node, other_node: [L, G] copies that a rank lacks and another rank of its node holds
            now, or else a rank of another node.
        kept: copies that are where they shall be.
        dropped: copies that are no longer wanted.
    """

    expert_bytes: int
    same_node: NDArray[np.int64]
    other_node: NDArray[np.int64]
    kept: int
    dropped: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        by_rank = (self.same_node + self.other_node).sum(axis=0)
        near, far = int(self.same_node.sum()), int(self.other_node.sum())
        return {
            "expert_bytes": self.expert_bytes,
            "moves": near + far,
            "bytes": (near + far) * self.expert_bytes,
            "moves_same_node": near,
            "moves_other_node": far,
            "kept": self.kept,
            "dropped": self.dropped,
            "moves_of_ranks": by_rank.tolist(),
            "most_bytes_of_a_rank": int(by_rank.max()) * self.expert_bytes,
        }


def moves_between(current: Placement, wanted: Placement, expert_bytes: int) -> Moves:
    """Count what every rank must fetch; slots within a rank may be filled in any order.

    Args:
        current: what ranks hold.
        wanted: what they shall hold.
        expert_bytes: of one expert of one layer.

    Raises:
        UsageError: the two are not of the same ranks, layers and experts.
    """
    for name in ("num_layers", "num_experts", "num_ranks", "ranks_per_node"):
        ours, theirs = getattr(wanted, name), getattr(current, name)
        if ours != theirs:
            raise UsageError(
                f"the plans differ in {name.replace('_', ' ')}: {ours}, and {theirs} in --against",
                "moves can be counted between plans for the same model and ranks",
            )
    before, after = _held(current), _held(wanted)
    missing = after & ~before
    shape = (*before.shape[:2], wanted.num_nodes, wanted.ranks_per_node)
    near = before.reshape(shape).any(axis=3).repeat(wanted.ranks_per_node, axis=2)
    return Moves(
        expert_bytes,
        (missing & near).sum(axis=1),
        (missing & ~near).sum(axis=1),
        int((after & before).sum()),
        int((before & ~after).sum()),
    )


def _held(placement: Placement) -> NDArray[np.bool_]:
    """[L, E, G] whether a rank holds an expert."""
    held = np.zeros((placement.num_layers, placement.num_experts, placement.num_ranks), bool)
    layer, slot = np.nonzero(placement.physical_to_logical >= 0)
    expert = placement.physical_to_logical[layer, slot]
    held[layer, expert, slot // placement.slots_per_rank] = True
    return held

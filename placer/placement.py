"""`Placement`: which expert sits in which slot of which rank, for every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots.

    Attributes:
        physical_to_logical: [L, S] int64, logical expert of each slot, -1 = empty;
            slot s belongs to rank s // slots_per_rank.
        num_experts: E.
        num_ranks: G.
        ranks_per_node: ranks of one node; node of rank g is g // ranks_per_node.
    """

    physical_to_logical: NDArray[np.int64]
    num_experts: int
    num_ranks: int
    ranks_per_node: int

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical.shape[0])

    @property
    def slots_per_rank(self) -> int:
        return int(self.physical_to_logical.shape[1]) // self.num_ranks

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    def ranks_of_experts(self) -> NDArray[np.int32]:
        """[L, E, C] ranks that hold a copy of each expert, increasing, padded with -1.

        C is the largest number of copies of any expert.
        """
        num_layers, num_slots = self.physical_to_logical.shape
        layer, slot = np.nonzero(self.physical_to_logical >= 0)
        expert = self.physical_to_logical[layer, slot]
        key = layer * self.num_experts + expert
        order = np.argsort(key, kind="stable")
        counts = np.bincount(key, minlength=num_layers * self.num_experts)
        first = np.concatenate(([0], np.cumsum(counts)[:-1]))
        copy = np.arange(key.size) - first[key[order]]
        ranks = np.full((num_layers * self.num_experts, max(1, int(counts.max()))), -1, np.int32)
        ranks[key[order], copy] = slot[order] // (num_slots // self.num_ranks)
        return ranks.reshape(num_layers, self.num_experts, -1)

    def for_rounds(self, layer_ids: NDArray[np.int64]) -> Placement:
        """The placement of each routing round: rounds of one layer use the same experts.

        Args:
            layer_ids: [L'] increasing layer numbers of a trace, once for each round.

        Returns:
            with a row per round; itself where no layer has a second round.
        """
        distinct, layer = np.unique(layer_ids, return_inverse=True)
        if distinct.size == layer.size or distinct.size != self.num_layers:
            return self
        return replace(self, physical_to_logical=self.physical_to_logical[layer])

    def problems(self) -> list[str]:
        """What is unsound about this placement; empty when nothing is."""
        table = self.physical_to_logical
        found: list[str] = []
        if table.ndim != 2 or table.shape[1] % self.num_ranks:
            return [f"{table.shape} slots cannot be divided among {self.num_ranks} ranks"]
        if self.num_ranks % self.ranks_per_node:
            found.append(
                f"{self.ranks_per_node} ranks per node do not divide {self.num_ranks} ranks"
            )
        if table.shape[1] < self.num_experts:
            return [*found, f"{table.shape[1]} slots cannot hold {self.num_experts} experts"]
        if table.min(initial=0) < -1 or table.max(initial=-1) >= self.num_experts:
            return [*found, f"expert ids must lie in -1..{self.num_experts - 1}"]
        for layer, row in enumerate(table):
            missing = np.setdiff1d(np.arange(self.num_experts), row)
            if missing.size:
                found.append(f"layer {layer}: no slot holds expert {missing[0]}")
            by_rank = np.sort(row.reshape(self.num_ranks, -1), axis=1)
            twice = (by_rank[:, 1:] == by_rank[:, :-1]) & (by_rank[:, 1:] >= 0)
            if twice.any():
                rank = int(np.nonzero(twice)[0][0])
                found.append(f"layer {layer}: rank {rank} holds an expert twice")
        return found


def contiguous(
    num_layers: int, num_experts: int, num_ranks: int, slots_per_rank: int, ranks_per_node: int
) -> Placement:
    """Experts in their order, as evenly as possible, spare slots empty at the end of each rank."""
    row = np.full((num_ranks, slots_per_rank), -1, np.int64)
    for rank, share in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
        row[rank, : share.size] = share
    table = np.tile(row.reshape(1, -1), (num_layers, 1))
    return Placement(table, num_experts, num_ranks, ranks_per_node)


def contiguous_like(other: Placement) -> Placement:
    """The contiguous placement of the same experts on the same ranks and slots."""
    return contiguous(
        other.num_layers,
        other.num_experts,
        other.num_ranks,
        other.slots_per_rank,
        other.ranks_per_node,
    )

"""Ranks, or nodes, as places that hold experts."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.problem import Problem


@dataclass(frozen=True)
class Groups:
    """Ranks, or nodes, as places that hold experts.

    Attributes:
        number: of groups.
        capacity: experts that one group can hold in a layer.
        spare: slots per layer beyond one for each expert, over all groups.
        size: ranks of a group.
    """

    number: int
    capacity: int
    spare: int
    size: int

    @staticmethod
    def ranks(problem: Problem) -> Groups:
        spare = problem.num_slots - problem.num_experts
        return Groups(problem.num_ranks, problem.slots_per_rank, spare, 1)

    @staticmethod
    def nodes(problem: Problem) -> Groups:
        spare = problem.num_slots - problem.num_experts
        size = problem.ranks_per_node
        return Groups(problem.num_nodes, problem.slots_per_rank * size, spare, size)

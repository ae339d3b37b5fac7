"""Experts in their order: what an engine does when nobody tells it otherwise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution


@register("contiguous", source="vLLM's and SGLang's default")
def contiguous(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Put the experts on the ranks in their order, equally many on each.

    Rank g gets the experts from E g / G on; where G does not divide E, the first E mod G ranks get
    one more. Spare slots stay empty at the end of each rank. Sees nothing. O(S).
    """
    return Solution(fill(problem, np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))))


def fill(problem: Problem, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """[L, S] placement of the experts in the given order, as evenly as possible over the ranks.

    Args:
        problem: for its ranks and slots.
        order: [L, E] a permutation of the experts in each layer.
    """
    placement = np.full(
        (problem.num_layers, problem.num_ranks, problem.slots_per_rank), -1, np.int64
    )
    for rank, positions in enumerate(
        np.array_split(np.arange(problem.num_experts), problem.num_ranks)
    ):
        placement[:, rank, : positions.size] = order[:, positions]
    return placement.reshape(problem.num_layers, problem.num_slots)

"""Occult: experts that collaborate go to one device.

Problem: equally many experts on each rank, so that the experts that fire together share one;
collaboration P_ij is the number of tokens that chose both i and j, over the largest of them.

Method, for one layer, device by device:

1. The first device starts with the pair of largest P_ij; each later one with the expert left whose
   mean collaboration with all experts placed so far is least (farthest-point sampling).
2. A device takes the expert left with the largest mean collaboration with those that it has, until
   it is full.

What the paper leaves open: devices are filled one after the other, and where G does not divide E
the first E mod G ones take one expert more; ties go to the lower expert number. Its pruning of the
router's choices changes the model's output and is left out (the paper's no-prune variant).

Complexity: O(L E^2). Guarantee: none. Redundant slots stay empty. Sees neither load nor nodes.

Source: Luo et al., Occult: Optimizing Collaborative Communications across Experts for Accelerated
Parallel MoE Training and Inference, ICML 2025 (arXiv 2505.13345), expert placement rescheduling
(Algorithm 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.packing import place_groups
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution


@register("occult", source="Occult (arXiv 2505.13345)", needs=("coactivation",))
def occult(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Put experts that fire together on one rank, rank by rank, equally many on each."""
    assert problem.coactivation is not None
    sizes = [
        part.size for part in np.array_split(np.arange(problem.num_experts), problem.num_ranks)
    ]
    groups = np.stack([collect(together, sizes) for together in problem.coactivation])
    return Solution(place_groups(groups, problem.num_ranks, problem.slots_per_rank))


def collect(together: NDArray[np.float64], sizes: list[int]) -> NDArray[np.int64]:
    """[E] device of each expert.

    Args:
        together: [E, E] tokens that chose both; the diagonal does not count.
        sizes: experts of each device, E in total.
    """
    num_experts = len(together)
    collaboration = together - np.diag(np.diag(together))
    device_of = np.full(num_experts, -1, np.int64)
    placed = np.zeros(num_experts)  # collaboration with all experts placed so far
    for device, size in enumerate(sizes):
        inside = np.zeros(num_experts)
        for position in range(size):
            free = device_of < 0
            if position > 0:
                expert = int(np.where(free, inside, -np.inf).argmax())
            elif device > 0:
                expert = int(np.where(free, placed, np.inf).argmin())
            else:
                expert = int(collaboration.max(axis=1).argmax())
            device_of[expert] = device
            inside += collaboration[expert]
            placed += collaboration[expert]
    return device_of

"""Experts at random: the control against which structure shows."""

from __future__ import annotations

import numpy as np

from solvers.budget import Budget
from solvers.contiguous import fill
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution


@register("random", source="placer")
def random_placement(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Put the experts on the ranks at random, equally many on each, anew in every layer.

    Spare slots stay empty at the end of each rank. Sees nothing; same seed, same placement. O(S).
    """
    rng = np.random.default_rng(seed)
    experts = np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))
    return Solution(fill(problem, rng.permuted(experts, axis=1)))

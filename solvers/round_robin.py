"""Experts dealt out like cards."""

from __future__ import annotations

import numpy as np

from solvers.budget import Budget
from solvers.contiguous import fill
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution


@register("round_robin", source="vLLM's expert_placement_strategy round_robin")
def round_robin(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Put expert e on rank e mod G.

    Spare slots stay empty at the end of each rank. Sees nothing; helps against models whose
    neighbouring experts are alike. O(S).
    """
    experts = np.arange(problem.num_experts)
    order = experts[np.argsort(experts % problem.num_ranks, kind="stable")]
    return Solution(fill(problem, np.tile(order, (problem.num_layers, 1))))

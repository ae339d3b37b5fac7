"""SGLang's topology-aware placement: experts near the ranks whose tokens use them.

Problem: one rank for every expert, equally many on each, so that what tokens pay from their home
ranks is small: N_se tokens at home on rank s use expert e, and a message from s to g costs d_sg.

Method, for one layer: experts in order of load, each to the rank with room of least
sum_s N_se d_sg, ties to the lower rank.

Costs are `Problem.link_cost`, or 0 on a rank, 1 within a node and 1 + node_weight between nodes.
Where G does not divide E, the first E mod G ranks take one expert more.

Complexity: O(L E G^2). Guarantee: none. Redundant slots stay empty. It gains as much as requests of
one rank are alike.

Source: SGLang (2026), python/sglang/srt/eplb/eplb_algorithms/topology_aware.py
(`rebalance_experts_topology_aware`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.packing import place_groups
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution
from solvers.topology import link_costs


@register(
    "sglang_topology",
    source="SGLang eplb_algorithms/topology_aware.py",
    needs=("tokens", "home"),
)
def sglang_topology(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Put each expert near the home ranks of the tokens that use it, equally many on each rank."""
    cost = link_costs(problem)
    room = np.array(
        [part.size for part in np.array_split(np.arange(problem.num_experts), problem.num_ranks)]
    )
    ranks = np.empty((problem.num_layers, problem.num_experts), np.int64)
    for layer in range(problem.num_layers):
        used = uses_by_home(problem, layer)
        left = room.copy()
        price = used.T @ cost
        for expert in np.argsort(-used.sum(axis=0), kind="stable"):
            rank = int(np.where(left > 0, price[expert], np.inf).argmin())
            ranks[layer, expert] = rank
            left[rank] -= 1
    return Solution(place_groups(ranks, problem.num_ranks, problem.slots_per_rank))


def uses_by_home(problem: Problem, layer: int) -> NDArray[np.float64]:
    """[G, E] tokens at home on each rank that use each expert."""
    assert problem.tokens is not None
    assert problem.home is not None
    experts = problem.tokens[:, layer, :].astype(np.int64)
    key = (problem.home[:, None] * problem.num_experts + experts)[experts >= 0]
    counts = np.bincount(key, minlength=problem.num_ranks * problem.num_experts)
    return counts.reshape(problem.num_ranks, problem.num_experts).astype(np.float64)

"""SGLang's balancer over a time series: replicas that lower the sum of the steps' maxima.

Problem: as EPLB's, copies of experts to slots, but for loads w_t[e] of steps t = 1..B instead of
their sum, so that a peak in one step is not made up for by a lull in another.

Method, for one layer (hierarchical: for the experts of one node, see `solvers.published.eplb`):

1. Each spare slot goes to the expert e that leaves least
       sum_t max_i w_t[i] / c_i(e),    c_i(e) = copies of i, one more of e.
   Only a step's own maximum can fall, so e is among the steps' busiest experts. Equal loads of a
   step are told apart by 1e-4 times the expert's number, as in the original.
2. Copies in order of their share of the load summed over steps are dealt to the ranks in a snake:
   first rank to last, last to first, and so on.

Steps are `Problem.batch`; without several batches the method is greedy on one step.

Differences from the original: no more copies of an expert than ranks, and doubles on a rank are
parted (`solvers.packing.part_doubles`); it assumes that ranks divide the slots of a node and that
nodes divide the experts.

Complexity: O(L R B E), R spare slots. Guarantee: none.

Source: SGLang, python/sglang/srt/eplb/eplb_algorithms/deepseek_vec.py
(`make_redundant_experts_chunkwise`; --eplb-algorithm deepseek_vec, deepseek_vec_hierarchical).
Its `elasticity_aware` is EPLB on the ranks that are alive: `eplb` with fewer ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.batch_loads import load_over_batches
from solvers.budget import Budget
from solvers.packing import part_doubles
from solvers.problem import Problem
from solvers.published.eplb import experts_of_nodes
from solvers.registry import register
from solvers.result import Solution

TIE_BREAK = 1e-4


@register(
    "sglang_vec",
    source="SGLang eplb_algorithms/deepseek_vec.py",
    needs=("tokens", "batch"),
    replicates=True,
)
def sglang_vec(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Balance load step by step: replicas lower the sum over batches of the busiest copy."""
    loads = load_over_batches(problem)
    hierarchical = problem.num_nodes > 1 and problem.num_groups % problem.num_nodes == 0
    num_nodes = problem.num_nodes if hierarchical else 1
    num_groups = problem.num_groups if hierarchical else 1
    table = np.full((problem.num_layers, num_nodes, problem.num_slots // num_nodes), -1, np.int64)
    num_doubles = 0
    for layer in range(problem.num_layers):
        total = loads[:, layer].sum(axis=0)
        for node, experts in enumerate(experts_of_nodes(total, num_groups, num_nodes)):
            placed, doubles = balance_over_steps(
                loads[:, layer, experts], problem.num_ranks // num_nodes, problem.slots_per_rank
            )
            table[layer, node] = np.where(placed >= 0, experts[placed], -1).ravel()
            num_doubles += doubles
    return Solution(
        table.reshape(problem.num_layers, -1),
        notes={
            "policy": "hierarchical" if hierarchical else "global",
            "batches": len(loads),
            "doubles_parted": num_doubles,
        },
    )


def balance_over_steps(
    loads: NDArray[np.float64], num_ranks: int, slots_per_rank: int
) -> tuple[NDArray[np.int64], int]:
    """Copies of experts on ranks.

    Args:
        loads: [B, E] of each expert in each step; at most num_ranks * slots_per_rank experts.

    Returns:
        [G, slots_per_rank] expert of each slot, -1 = empty, and how many doubles were parted.
    """
    experts = replicate_over_steps(loads, num_ranks * slots_per_rank, num_ranks)
    share = loads.sum(axis=0) / np.bincount(experts, minlength=loads.shape[1])
    table = np.full((num_ranks, slots_per_rank), -1, np.int64)
    row, rank = np.divmod(np.arange(experts.size), num_ranks)
    rank = np.where(row % 2 == 1, num_ranks - 1 - rank, rank)
    table[rank, row] = experts[np.argsort(-share[experts], kind="stable")]
    return table, part_doubles(table, share)


def replicate_over_steps(
    loads: NDArray[np.float64], num_slots: int, max_copies: int
) -> NDArray[np.int64]:
    """Expert of each copy: every expert once, then the replicas in order of creation."""
    num_steps, num_experts = loads.shape
    told_apart = loads + TIE_BREAK * np.arange(num_experts)
    copies = np.ones(num_experts, np.int64)
    experts = list(range(num_experts))
    step = np.arange(num_steps)
    for _ in range(min(num_slots, num_experts * max_copies) - num_experts):
        now = told_apart / copies
        busiest = now.argmax(axis=1)
        largest = now[step, busiest]
        now[step, busiest] = loads[step, busiest] / (copies[busiest] + 1)
        fall = np.bincount(busiest, largest - now.max(axis=1), minlength=num_experts)
        expert = int(np.where(copies < max_copies, fall, -np.inf).argmax())
        copies[expert] += 1
        experts.append(expert)
    return np.array(experts, np.int64)

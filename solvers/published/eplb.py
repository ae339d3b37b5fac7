"""DeepSeek's expert-parallelism load balancer, written anew from its published description.

Problem: copies of experts to slots so that the ranks of a layer carry equal load, each copy of an
expert carrying an equal share of its load. Layers are independent.

Method, for one layer:

1. Groups to nodes (hierarchical only). The experts of a group are consecutive; groups are packed
   into nodes, equally many in each, heaviest first into the least loaded node with room.
2. Copies. Within a node (hierarchical) or over all ranks (global) every spare slot goes, one by
   one, to the expert whose copies carry most: argmax load_e / copies_e.
3. Copies to ranks. Within a node or over all ranks, heaviest first into the least loaded rank with
   a free slot.

Hierarchical applies when the number of nodes divides the number of expert groups, else global.

Differences from the original: it may put an expert on a rank twice, or copy it more often than
there are ranks; placer's plans forbid both. Here an expert gets at most one copy per rank (slots
that no expert can use stay empty), and a double is traded for a copy on another rank, the trade
that raises the larger of the two ranks' loads least; see `solvers.packing.part_doubles`.

Complexity: O(L (S log S + S G)) and O(S) per double. Guarantee: none on the optimum; greedy packing
without the slot limit is within 4/3 of it.

Source: DeepSeek-AI, DeepSeek-V3 Technical Report (arXiv 2412.19437), section 3.4, and the
description in github.com/deepseek-ai/EPLB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.packing import pack, part_doubles, replicate
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution

SOURCE = "DeepSeek EPLB (arXiv 2412.19437)"


@register("eplb", source=SOURCE, replicates=True)
def eplb(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Balance load with redundant experts: hierarchical where expert groups allow, else global.

    Hierarchical needs a number of expert groups that the number of nodes divides.
    """
    hierarchical = problem.num_groups % problem.num_nodes == 0
    return _solve(problem, problem.num_groups if hierarchical else 1, hierarchical)


@register("eplb_global", source=SOURCE, replicates=True)
def eplb_global(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Balance load with redundant experts over all ranks, whatever their nodes."""
    return _solve(problem, 1, False)


def _solve(problem: Problem, num_groups: int, hierarchical: bool) -> Solution:
    num_nodes = problem.num_nodes if hierarchical else 1
    slots_per_node = problem.num_slots // num_nodes
    placement = np.empty((problem.num_layers, problem.num_slots), np.int64)
    num_doubles = 0
    for layer, load in enumerate(problem.load):
        for node, experts in enumerate(experts_of_nodes(load, num_groups, num_nodes)):
            table, doubles = balance(
                load[experts], problem.num_ranks // num_nodes, problem.slots_per_rank
            )
            slots = slice(node * slots_per_node, (node + 1) * slots_per_node)
            placement[layer, slots] = np.where(table >= 0, experts[table], -1).ravel()
            num_doubles += doubles
    policy = "hierarchical" if hierarchical and num_nodes > 1 else "global"
    return Solution(placement, notes={"policy": policy, "doubles_parted": num_doubles})


def experts_of_nodes(
    load: NDArray[np.float64], num_groups: int, num_nodes: int
) -> list[NDArray[np.int64]]:
    """Step 1: the experts of each node."""
    groups = np.arange(load.size).reshape(num_groups, -1)
    node_of_group = pack(load[groups].sum(axis=1), num_nodes, num_groups // num_nodes)
    return [groups[members].ravel() for members in node_of_group]


def balance(
    load: NDArray[np.float64], num_ranks: int, slots_per_rank: int
) -> tuple[NDArray[np.int64], int]:
    """Steps 2 and 3: copies of experts on ranks.

    Args:
        load: [E] of each expert; at most num_ranks * slots_per_rank of them.

    Returns:
        [G, slots_per_rank] expert of each slot, -1 = empty, and how many doubles were parted.
    """
    experts = replicate(load, num_ranks * slots_per_rank, num_ranks)
    share = load / np.bincount(experts, minlength=load.size)
    table = np.full((num_ranks, slots_per_rank), -1, np.int64)
    for rank, members in enumerate(pack(share[experts], num_ranks, slots_per_rank)):
        table[rank, : len(members)] = experts[members]
    return table, part_doubles(table, share)

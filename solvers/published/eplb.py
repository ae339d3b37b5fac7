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
that raises the larger of the two ranks' loads least; see `_part_doubles`.

Complexity: O(L (S log S + S G)) and O(S) per double. Guarantee: none on the optimum; greedy packing
without the slot limit is within 4/3 of it.

Source: DeepSeek-AI, DeepSeek-V3 Technical Report (arXiv 2412.19437), section 3.4, and the
description in github.com/deepseek-ai/EPLB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
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
        for node, experts in enumerate(_experts_of_nodes(load, num_groups, num_nodes)):
            table, doubles = balance(
                load[experts], problem.num_ranks // num_nodes, problem.slots_per_rank
            )
            slots = slice(node * slots_per_node, (node + 1) * slots_per_node)
            placement[layer, slots] = np.where(table >= 0, experts[table], -1).ravel()
            num_doubles += doubles
    policy = "hierarchical" if hierarchical and num_nodes > 1 else "global"
    return Solution(placement, notes={"policy": policy, "doubles_parted": num_doubles})


def _experts_of_nodes(
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
    return table, _part_doubles(table, share)


def replicate(load: NDArray[np.float64], num_slots: int, max_copies: int) -> NDArray[np.int64]:
    """Expert of each copy: every expert once, then the spare slots' replicas in order of creation.

    Each spare slot goes to the expert with the most load per copy, among those with fewer than
    max_copies; this minimises the largest load per copy.
    """
    copies = np.ones(load.size, np.int64)
    experts = list(range(load.size))
    for _ in range(min(num_slots, load.size * max_copies) - load.size):
        expert = int(np.where(copies < max_copies, load / copies, -1.0).argmax())
        copies[expert] += 1
        experts.append(expert)
    return np.array(experts, np.int64)


def pack(weight: NDArray[np.float64], num_packs: int, pack_size: int) -> list[list[int]]:
    """Items of each pack: heaviest first into the lightest pack with room, ties to the lower pack.

    Args:
        weight: [n] of the items, n <= num_packs * pack_size. Where every pack takes a single item,
            the order does not matter and is kept.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = np.zeros(num_packs)
    order = np.arange(weight.size) if pack_size == 1 else np.argsort(-weight, kind="stable")
    for position, item in enumerate(order):
        lightest = position if pack_size == 1 else int(total.argmin())
        packs[lightest].append(int(item))
        total[lightest] += weight[item]
        if len(packs[lightest]) == pack_size:
            total[lightest] = np.inf
    return packs


def _part_doubles(table: NDArray[np.int64], share: NDArray[np.float64]) -> int:
    """Trade copies between ranks, in place, until no rank holds an expert twice.

    A trade gives a double e of rank g to a rank r without e, for an f that g lacks or that is
    itself a double on r; either way one double fewer is left. There is always one: if r has no
    doubles, it has more experts other than e than g has.

    Returns:
        the number of trades.
    """
    num_trades = 0
    while True:
        rows = np.sort(table, axis=1)
        doubled = (rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)
        if not doubled.any():
            return num_trades
        rank, position = (int(i) for i in np.argwhere(doubled)[0])
        expert = int(rows[rank, position])
        weight = np.where(table >= 0, share[table], 0.0)
        load = weight.sum(axis=1)
        here = np.isin(table, table[rank])
        double_there = (table[:, :, None] == table[:, None, :]).sum(axis=2) > 1
        lacks = ~(table == expert).any(axis=1, keepdims=True)
        allowed = lacks & ((table < 0) | ~here | double_there)
        change = share[expert] - weight
        larger = np.maximum(load[:, None] + change, load[rank] - change)
        other, slot = np.unravel_index(np.where(allowed, larger, np.inf).argmin(), table.shape)
        mine = int(np.nonzero(table[rank] == expert)[0][0])
        table[rank, mine], table[other, slot] = table[other, slot], expert
        num_trades += 1

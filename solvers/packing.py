"""Copies of experts, and their packing onto ranks by load: what the published balancers share.

The greedy rules are those of DeepSeek's EPLB; parting doubles is placer's own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


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


def part_doubles(table: NDArray[np.int64], share: NDArray[np.float64]) -> int:
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


def place_groups(groups: NDArray[np.int64], num_ranks: int, slots_per_rank: int) -> Slots:
    """[L, S] placement of experts without copies; a rank's empty slots at its end.

    Args:
        groups: [L, E] rank of each expert, at most slots_per_rank of them on each.
    """
    num_layers, num_experts = groups.shape
    table = np.full((num_layers, num_ranks, slots_per_rank), -1, np.int64)
    for layer, ranks in enumerate(groups):
        order = np.argsort(ranks, kind="stable")
        held = np.bincount(ranks, minlength=num_ranks)
        slot = np.arange(num_experts) - np.repeat(held.cumsum() - held, held)
        table[layer, ranks[order], slot] = order
    return table.reshape(num_layers, num_ranks * slots_per_rank)

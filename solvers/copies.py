"""Kernels: which ranks hold copies of which experts of one layer, kept up to date by moves.

Shape letters: E experts, G ranks, S slots, C copies, M = ceil(G / 64) words.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from solvers.anneal import popcount
from solvers.compiling import compiled, compiled_lean

# count [E], ranks [E, C] of each expert's copies; mask [E, M] uint64 the same ranks as bits;
# listed [E + 1]: how many experts have several copies, then which, lower numbers first
Copies = namedtuple("Copies", ["count", "ranks", "mask", "listed"])


@compiled
def new_copies(slots: Any, num_experts: int, num_ranks: int, most: int) -> Any:
    """The copies that slots [S] hold; an expert never has more than `most`."""
    copies = Copies(
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, most), np.int64),
        np.zeros((num_experts, (num_ranks + 63) // 64), np.uint64),
        np.zeros(num_experts + 1, np.int64),
    )
    width = slots.size // num_ranks
    for slot in range(slots.size):
        if slots[slot] >= 0:
            move_copy(copies, slots[slot], -1, slot // width)
    return copies


@compiled_lean
def move_copy(copies: Any, expert: int, source: int, target: int) -> None:
    """The copy on rank source is on rank target now; -1: there is none. Nothing for no expert."""
    if expert < 0:
        return
    ranks, mask, listed = copies.ranks[expert], copies.mask[expert], copies.listed
    count = copies.count[expert]
    if source >= 0:
        count -= 1
        for i in range(count):
            if ranks[i] == source:
                ranks[i] = ranks[count]
                break
        mask[source >> 6] &= ~(np.uint64(1) << np.uint64(source & 63))
    if target >= 0:
        ranks[count] = target
        mask[target >> 6] |= np.uint64(1) << np.uint64(target & 63)
        count += 1
    before = copies.count[expert]
    copies.count[expert] = count
    if count >= 2 and before < 2:
        place = listed[0] + 1
        while place > 1 and listed[place - 1] > expert:
            listed[place] = listed[place - 1]
            place -= 1
        listed[place] = expert
        listed[0] += 1
    elif count < 2 and before >= 2:
        place = 1
        while listed[place] != expert:
            place += 1
        while place < listed[0]:
            listed[place] = listed[place + 1]
            place += 1
        listed[0] -= 1


@compiled_lean
def has_copy(copies: Any, expert: int, rank: int) -> Any:
    return (copies.mask[expert, rank >> 6] >> np.uint64(rank & 63)) & np.uint64(1) != 0


@compiled_lean
def common_ranks(mask: Any, other: Any) -> Any:
    """Ranks in both of two masks [M]."""
    common = np.int64(0)
    for word in range(mask.size):
        common += np.int64(popcount(mask[word] & other[word]))
    return common

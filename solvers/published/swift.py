"""vllm-ascend's Swift balancer: few moves from the placement in use.

Problem: lower the busiest rank's load with at most one expert sent from any rank to any other, so
that a new placement is quickly in force.

Method, for one layer whose max / mean rank load is 1.01 or more:

1. In the placement in use, the first copy of each expert that is met going slot by slot, rank by
   rank, is its home; the slots of the other copies are free.
2. Each free slot gets, one after the other, an expert for a replica: the one whose copies carry
   most, with fewer copies than ranks.
3. Replicas, heaviest first, go to the least loaded rank with a free slot that lacks the expert and
   has received nothing yet from the expert's home. Slots still free then take the heaviest expert
   that their rank lacks.
4. Up to 100 times, the busiest rank exchanges a pair of experts with another rank, the least loaded
   first: the pair that leaves the lower maximum of the two, if that lowers the busiest by 1 % of
   the mean or more, and if neither has sent the other anything. Experts that have just come stay.
5. The layer keeps its placement if the new one is not better.

The placement in use is `Problem.current`; without one, vLLM's initial one: experts in their order,
then experts 0, 1, ... again in the redundant slots.

Differences from the original: where the placement in use has an expert twice on a rank, the second
one is an empty slot.

Complexity: O(L (R E + 100 G K^2)), R redundant slots, K slots of a rank. Guarantee: never worse in
load than the placement in use.

Source: vllm-ascend (August 2026), vllm_ascend/eplb/core/policy/policy_swift_balancer.py
(`SwiftBalanceEplb.rebalance_experts`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution

THRESHOLD = 1.01
LEAST_GAIN = 0.01
MAX_SWAPS = 100

Table = NDArray[np.int64]


@register("swift", source="vllm-ascend policy_swift_balancer.py", replicates=True)
def swift(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Balance load with few moves from the placement in use, or from the initial one."""
    before = initial(problem) if problem.current is None else problem.current
    shape = (problem.num_layers, problem.num_ranks, problem.slots_per_rank)
    placement = before.reshape(shape).copy()
    num_kept = 0
    for layer, load in enumerate(problem.load):
        table = placement[layer]
        mean = float(load.sum()) / problem.num_ranks
        busiest = rank_load(table, load).max()
        if mean == 0 or busiest < THRESHOLD * mean:
            num_kept += 1
            continue
        rebalanced = Exchange(table, load).run()
        if rank_load(rebalanced, load).max() < busiest:
            placement[layer] = rebalanced
        else:
            num_kept += 1
    return Solution(placement.reshape(problem.num_layers, -1), notes={"layers_kept": num_kept})


def initial(problem: Problem) -> Table:
    """[L, S] vLLM's placement before any balancing; no double on a rank.

    Where ranks hold every expert once, the slots that are left stay empty.
    """
    num_experts, num_slots = problem.num_experts, problem.num_slots
    row = (np.arange(num_slots) % num_experts).reshape(problem.num_ranks, -1)
    row = np.where(np.arange(row.shape[1]) < num_experts, row, -1)
    return np.tile(row.ravel(), (problem.num_layers, 1))


def rank_load(table: Table, load: NDArray[np.float64]) -> NDArray[np.float64]:
    """[G] load of each rank, an expert's split evenly over its copies."""
    share = load / np.bincount(table[table >= 0], minlength=load.size)
    total: NDArray[np.float64] = np.where(table >= 0, share[table], 0.0).sum(axis=1)
    return total


class Exchange:
    """Steps 1 to 4 for one layer.

    Args:
        table: [G, K] the placement in use.
        load: [E].
    """

    def __init__(self, table: Table, load: NDArray[np.float64]) -> None:
        self.load = load
        self.num_ranks, self.num_slots = table.shape
        self.table = np.full_like(table, -1)
        self.home = np.full(load.size, -1, np.int64)
        for slot in range(self.num_slots):
            for rank in range(self.num_ranks):
                expert = table[rank, slot]
                if expert >= 0 and self.home[expert] < 0:
                    self.home[expert] = rank
                    self.table[rank, slot] = expert
        self.sent = np.zeros((self.num_ranks, self.num_ranks), np.int64)
        self.came: list[set[int]] = [set() for _ in range(self.num_ranks)]

    def run(self) -> Table:
        """[G, K] the new placement."""
        self.replicate()
        self.swap()
        return self.table

    def replicate(self) -> None:
        """Steps 2 and 3."""
        copies = np.ones(self.load.size, np.int64)
        for _ in range(int((self.table < 0).sum())):
            share = np.where(copies < self.num_ranks, self.load / copies, -1.0)
            copies[share.size - 1 - int(share[::-1].argmax())] += self.num_ranks > 1
        share = self.load / copies
        replicas = np.repeat(np.arange(copies.size), copies - 1)
        rank_load = np.where(self.table >= 0, share[self.table], 0.0).sum(axis=1)
        for expert in replicas[np.argsort(-share[replicas], kind="stable")]:
            allowed = (
                (self.table < 0).any(axis=1)
                & ~(self.table == expert).any(axis=1)
                & (self.sent[self.home[expert]] < 1)
            )
            if allowed.any():
                rank = int(np.where(allowed, rank_load, np.inf).argmin())
                self._receive(int(expert), rank)
                rank_load[rank] += share[expert]
        copies = np.bincount(self.table[self.table >= 0], minlength=self.load.size)
        for rank in range(self.num_ranks):
            while (self.table[rank] < 0).any():
                share = self.load / copies
                share[self.table[rank][self.table[rank] >= 0]] = -1.0
                expert = share.size - 1 - int(share[::-1].argmax())
                if share[expert] < 0:
                    break
                self._receive(expert, rank)
                copies[expert] += 1

    def _receive(self, expert: int, rank: int) -> None:
        slot = int(np.nonzero(self.table[rank] < 0)[0][-1])
        self.table[rank, slot] = expert
        self.sent[self.home[expert], rank] += 1
        self.came[rank].add(expert)

    def swap(self) -> None:
        """Step 4."""
        share = self.load / np.bincount(self.table[self.table >= 0], minlength=self.load.size)
        least_gain = LEAST_GAIN * float(self.load.sum()) / self.num_ranks
        for _ in range(MAX_SWAPS):
            total = np.where(self.table >= 0, share[self.table], 0.0).sum(axis=1)
            order = np.argsort(total, kind="stable")
            busiest = int(order[-1])
            for other in order[:-1]:
                if self.sent[busiest, other] or self.sent[other, busiest]:
                    continue
                pair = self._best_pair(busiest, int(other), share, total)
                if pair is None or total[busiest] - pair[2] < least_gain:
                    continue
                mine, theirs, _ = pair
                one, two = self.table[busiest, mine], self.table[other, theirs]
                self.table[busiest, mine], self.table[other, theirs] = two, one
                self.came[busiest].add(int(two))
                self.came[int(other)].add(int(one))
                self.sent[busiest, other] += 1
                self.sent[other, busiest] += 1
                break
            else:
                return

    def _best_pair(
        self, busiest: int, other: int, share: NDArray[np.float64], total: NDArray[np.float64]
    ) -> tuple[int, int, float] | None:
        """Slots of the two ranks whose exchange leaves the least maximum of their loads, and it."""
        mine, theirs = self.table[busiest], self.table[other]
        may_go = (mine >= 0) & ~np.isin(mine, theirs) & ~np.isin(mine, list(self.came[busiest]))
        may_come = (theirs >= 0) & ~np.isin(theirs, mine) & ~np.isin(theirs, list(self.came[other]))
        change = share[mine][:, None] - share[theirs][None, :]
        after = np.maximum(total[busiest] - change, total[other] + change)
        after = np.where(may_go[:, None] & may_come[None, :], after, np.inf)
        slot, slot_there = np.unravel_index(after.argmin(), after.shape)
        if not after[slot, slot_there] < total[busiest]:
            return None
        return int(slot), int(slot_there), float(after[slot, slot_there])

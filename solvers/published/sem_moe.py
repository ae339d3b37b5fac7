"""Sem-MoE: tokens and experts clustered together, one after the other, so that they meet at home.

Problem: with R_ij = 1 if token j is at home on rank i, C_ik = 1 if expert k is on rank i, a_j how
often token j comes and p_jk the share of its activations that are of expert k,

    minimise   theta sum_i |sum_j R_ij a_j - S/G| + (1 - theta) sum_{i != i'} R_ij C_i'k p_jk a_j

over R and C, each token and each expert on one rank, equally many experts on each; S = sum a_j.

Method: alternate from a random C (Algorithm 1). Given C, every token goes to the rank that has most
of what it activates; then, while a rank is too full, the token leaves it for an emptier one
that loses least by it, if that is less than the balance gains. Given R, the experts of a layer are
a transport problem, solved exactly. The best of `NUM_STARTS` starts.

What is different here: the paper's rows are the vocabulary's tokens, which routing traces don't
hold; here they are the trace's own tokens (a_j = 1), up to `NUM_TOKENS` evenly spaced, over all
layers at once, since a token's home is the same in every layer. theta = 0.5, as the paper leaves it
open, and p_jk is averaged over layers, so that both terms count tokens. Only the experts' side goes
into the plan: homes are the scheduler's business, and plans are judged with the homes of the trace.

Complexity: O(NUM_STARTS rounds (T L K + L E G^2)). Guarantee: none. Redundant slots stay empty.

Source: Li et al., Semantic Parallelism: Redefining Efficient MoE Inference via Model-Data
Co-Scheduling (Sem-MoE), ICLR 2026 (arXiv 2503.04398), offline model scheduling.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.packing import place_groups
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution

THETA = 0.5
NUM_STARTS = 3
NUM_TOKENS = 8192
MAX_ROUNDS = 40

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@register("sem_moe", source="Sem-MoE (arXiv 2503.04398)", needs=("tokens",))
def sem_moe(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Cluster tokens and experts in turn, so that tokens find their experts at home."""
    assert problem.tokens is not None
    stride = -(-len(problem.tokens) // NUM_TOKENS)
    clustering = CoClustering(
        problem.tokens[::stride].astype(np.int64), problem.num_experts, problem.num_ranks
    )
    rng = np.random.default_rng(seed)
    best: tuple[float, Ids] | None = None
    for _ in range(NUM_STARTS):
        if best is not None and budget.expired():
            break
        cost, ranks = clustering.run(rng, budget)
        if best is None or cost < best[0]:
            best = cost, ranks
    assert best is not None
    placement = place_groups(best[1], problem.num_ranks, problem.slots_per_rank)
    return Solution(
        placement, termination=budget.termination(), notes={"co_clustering_cost": best[0]}
    )


class CoClustering:
    """The alternation.

    Args:
        tokens: [T, L, K] experts of each token, -1 = unused.
        num_experts, num_ranks: E, G.
    """

    def __init__(self, tokens: Ids, num_experts: int, num_ranks: int) -> None:
        self.tokens = tokens
        self.num_experts, self.num_ranks = num_experts, num_ranks
        used = (tokens >= 0).sum(axis=2)
        active = np.maximum((used > 0).sum(axis=1), 1)
        self.weight = 1.0 / (np.maximum(used, 1) * active[:, None])  # [T, L] p_jk of an activation
        shares = [part.size for part in np.array_split(np.arange(num_experts), num_ranks)]
        self.capacity = np.array(shares, np.int64)

    def run(self, rng: np.random.Generator, budget: Budget) -> tuple[float, Ids]:
        """The cost of one start, and the [L, E] rank of each expert."""
        num_layers = self.tokens.shape[1]
        deal = np.repeat(np.arange(self.num_ranks), self.capacity)
        ranks = rng.permuted(np.tile(deal, (num_layers, 1)), axis=1)
        homes = self.place_tokens(self.met(ranks))
        cost = self.cost(ranks, homes)
        for _ in range(MAX_ROUNDS):
            if budget.expired():
                break
            new_ranks = self.place_experts(homes)
            new_homes = self.place_tokens(self.met(new_ranks))
            new_cost = self.cost(new_ranks, new_homes)
            if new_cost >= cost * (1 - 1e-9):
                break
            ranks, homes, cost = new_ranks, new_homes, new_cost
        return cost, ranks

    def met(self, ranks: Ids) -> Floats:
        """[T, G] share of each token's activations that each rank has.

        Args:
            ranks: [L, E] rank of each expert.
        """
        num_tokens, num_layers, width = self.tokens.shape
        met = np.zeros(num_tokens * self.num_ranks)
        first = np.arange(num_tokens) * self.num_ranks
        for layer in range(num_layers):
            for column in range(width):
                expert = self.tokens[:, layer, column]
                weight = np.where(expert >= 0, self.weight[:, layer], 0.0)
                met += np.bincount(first + ranks[layer, expert], weight, minlength=met.size)
        return met.reshape(num_tokens, self.num_ranks)

    def place_tokens(self, met: Floats) -> Ids:
        """[T] home of each token, given what it meets on each rank [T, G]."""
        homes: Ids = met.argmax(axis=1)
        fair = len(homes) / self.num_ranks
        size = np.bincount(homes, minlength=self.num_ranks)
        while True:
            full, empty = np.nonzero(size > fair)[0], np.nonzero(size < fair)[0]
            movers = np.nonzero(size[homes] > fair)[0]
            if not full.size or not empty.size:
                return homes
            loss = met[movers, homes[movers]][:, None] - met[np.ix_(movers, empty)]
            target = loss.argmin(axis=1)
            least = loss[np.arange(movers.size), target]
            moved = 0
            for index in np.argsort(least, kind="stable"):
                token, rank = movers[index], empty[target[index]]
                if size[homes[token]] <= fair or size[rank] >= fair:
                    continue
                gain = self._balance_gain(size[homes[token]], size[rank], fair)
                if least[index] * (1 - THETA) >= gain * THETA:
                    continue
                size[homes[token]] -= 1
                size[rank] += 1
                homes[token] = rank
                moved += 1
            if moved == 0:
                return homes

    @staticmethod
    def _balance_gain(source: int, target: int, fair: float) -> float:
        before = abs(source - fair) + abs(target - fair)
        return before - abs(source - 1 - fair) - abs(target + 1 - fair)

    def place_experts(self, homes: Ids) -> Ids:
        """[L, E] rank of each expert, given the tokens' homes [T]; exact."""
        from solvers.assignment import assign

        num_layers, width = self.tokens.shape[1:]
        ranks = np.empty((num_layers, self.num_experts), np.int64)
        for layer in range(num_layers):
            profit = np.zeros(self.num_experts * self.num_ranks)
            for column in range(width):
                expert = self.tokens[:, layer, column]
                used = expert >= 0
                profit += np.bincount(
                    expert[used] * self.num_ranks + homes[used],
                    self.weight[used, layer],
                    minlength=profit.size,
                )
            ranks[layer] = assign(profit.reshape(self.num_experts, self.num_ranks), self.capacity)
        return ranks

    def cost(self, ranks: Ids, homes: Ids) -> float:
        """The objective, per token."""
        num_tokens = len(homes)
        met = self.met(ranks)
        remote = float((met.sum(axis=1) - met[np.arange(num_tokens), homes]).sum())
        size = np.bincount(homes, minlength=self.num_ranks)
        uneven = float(np.abs(size - num_tokens / self.num_ranks).sum())
        return (THETA * uneven + (1 - THETA) * remote) / num_tokens

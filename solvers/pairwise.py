"""Keep pairs of experts on a rank: inter-layer affinity, or co-activation.

Problem: equally many experts of a layer on each rank, so that as much as possible of

    affinity:      sum over neighbouring layers of flow_l[i, j] [g_l(i) = g_l+1(j)]
    co-activation: sum over layers of together_l[i, j] [g_l(i) = g_l(j)]

stays within ranks, optionally under a cap on imbalance.

Method. Affinity without a cap is the work of `solvers.chain`: alternating assignment, recombination
of many starts by dynamic programming, disturbed windows. Co-activation without a cap falls apart
into layers; each is annealed by swaps (`solvers.swapping`) from several starts, and the best is
kept layer by layer. A cap is a price on the largest rank load of each layer: the least price at
which an annealed placement keeps it is searched for by bisection, and annealed there again.

Small problems are then solved exactly, or proven to be (`solvers.exact_pairs`, `solvers.proving`).

Complexity: see there; O(starts x L x E) proposals. Guarantee: none by itself; `solvers.bounds`
proves how far from the optimum it can be. Deterministic for a seed. Source: placer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise as steps

import numpy as np
from numpy.typing import NDArray

from solvers import check
from solvers.bounds.transport import ROUNDING
from solvers.budget import Budget
from solvers.chain import Effort, effort_for, keep_flow
from solvers.contiguous import fill
from solvers.preferring import imbalance_of_loads
from solvers.problem import Problem
from solvers.proving import prove
from solvers.registry import register
from solvers.result import RequestError, Solution

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]

_HOT, _WARM, _COLD = 0.5, 0.3, 0.01  # temperatures, in standard deviations of what experts keep
_STARTS = 8
_PROPOSALS_PER_EXPERT, _MOST_PROPOSALS = 4000, 60_000_000
_STEPS = 14  # of the bisection


@register("pairwise", source="placer")
def pairwise(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Keep affinity, or co-activation where that is the objective, on ranks of equal size.

    Sees load only through the cap on imbalance. Fills no spare slot.
    """
    weights = _Weights.of(problem)
    search = _Search(problem, weights, seed, budget)
    ranks = search.free()
    notes: dict[str, float | int | str] = {}
    bound = None
    figure = check.PAIRWISE["affinity" if len(weights.flow) else "coactivation"][0]
    proof = prove(problem, figure, ranks, budget)
    if proof is not None:
        ranks, bound = proof.ranks, max(0.0, 1.0 - proof.kept - ROUNDING)
        notes["exact"] = proof.method
    if problem.max_imbalance is not None:
        ranks = search.capped(ranks)
    return Solution(
        _placement(problem, ranks),
        lower_bound=bound,
        bound_of="objective" if bound is None else figure,
        termination=budget.termination(),
        notes=notes,
    )


@dataclass(frozen=True, eq=False)
class _Weights:
    """What pairs are worth, one in all; an array of no layers does not count.

    Attributes:
        together: [L or 0, E, E] symmetric, zero diagonal; an unordered pair is worth one entry.
        flow: [L-1 or 0, E, E].
        relative: [L, E] load in units of the mean rank load.
    """

    together: Floats
    flow: Floats
    relative: Floats

    @staticmethod
    def of(problem: Problem) -> _Weights:
        num_experts = problem.num_experts
        none = np.zeros((0, num_experts, num_experts))
        mean = problem.load.sum(axis=1, keepdims=True) / problem.num_ranks
        relative = np.divide(
            problem.load, mean, out=np.zeros(problem.load.shape), where=mean > 0
        ).astype(np.float64)
        if problem.objective == "affinity":
            if problem.affinity is None or problem.num_layers < 2:
                raise RequestError(
                    "solver 'pairwise' needs affinity between two layers or more for objective "
                    "'affinity'"
                )
            flow = problem.affinity.astype(np.float64)
            return _Weights(none, flow / max(1e-300, float(flow.sum())), relative)
        if problem.coactivation is None:
            raise RequestError("solver 'pairwise' needs coactivation, which the problem lacks")
        pairs = problem.coactivation * (1.0 - np.eye(num_experts))
        return _Weights(2 * pairs / max(1e-300, float(pairs.sum())), none, relative)


class _Search:
    def __init__(self, problem: Problem, weights: _Weights, seed: int, budget: Budget) -> None:
        self.problem, self.weights, self.budget = problem, weights, budget
        self.rng = np.random.default_rng(seed)
        self.sizes = np.array(
            [
                part.size
                for part in np.array_split(np.arange(problem.num_experts), problem.num_ranks)
            ]
        )
        shape = problem.num_layers, problem.num_experts
        self.table = np.empty((*shape, problem.num_ranks))
        self.proposals = int(min(_PROPOSALS_PER_EXPERT * shape[0] * shape[1], _MOST_PROPOSALS))

    def free(self) -> Ranks:
        """[L, E] ranks without regard to load."""
        problem = self.problem
        if len(self.weights.flow):
            usual = effort_for(problem.num_layers, problem.num_experts, problem.num_ranks)
            effort = Effort(2 * usual.num_starts, 3 * usual.num_rounds, usual.num_windows)
            return keep_flow(self.weights.flow, self.sizes, self.rng, self.budget, effort)
        best = self.contiguous()
        kept = self.kept_by_layer(best)
        for _ in range(_STARTS):
            if self.budget.expired():
                break
            start = self.rng.permuted(self.contiguous(), axis=1)
            found = self.anneal(start, 0.0, _HOT, self.proposals)
            now = self.kept_by_layer(found)
            better = now > kept
            best[better], kept[better] = found[better], now[better]
        return best

    def capped(self, free: Ranks) -> Ranks:
        """[L, E] ranks that keep the cap, from ones that do not care; else the least imbalanced."""
        cap, num_layers = self.problem.max_imbalance, self.problem.num_layers
        assert cap is not None
        least_imbalanced = free
        keeping: Ranks | None = free if self.imbalance(free) <= cap else None
        low, high, price = 0.0, np.inf, 0.02 / num_layers
        for _ in range(_STEPS):
            if self.budget.expired() or (keeping is free):
                break
            found = self.anneal(free, price, _WARM, self.proposals)
            if self.imbalance(found) < self.imbalance(least_imbalanced):
                least_imbalanced = found
            if self.imbalance(found) <= cap:
                high = price
                if keeping is None or self.kept(found) > self.kept(keeping):
                    keeping = found
            else:
                low = price
            price = 4 * low if high == np.inf else (low + high) / 2
        return least_imbalanced if keeping is None else keeping

    def anneal(self, start: Ranks, price: float, hot: float, proposals: int) -> Ranks:
        """Anneal a copy of `start`, a piece at a time so that the budget can end it."""
        from solvers.swapping import anneal_swaps, fill_table

        weights, ranks = self.weights, start.copy()
        fill_table(ranks, weights.together, weights.flow, self.table)
        spread = float(self.table.std()) or 1e-12
        pieces = max(1, proposals // 2_000_000)
        temperatures = spread * hot * (_COLD / hot) ** (np.arange(pieces + 1) / pieces)
        for warm, cold in steps(temperatures):
            if self.budget.expired():
                break
            anneal_swaps(
                ranks,
                weights.together,
                weights.flow,
                weights.relative,
                self.problem.fair_share,
                price,
                warm,
                cold,
                proposals // pieces,
                int(self.rng.integers(2**31)),
                self.table,
            )
        return ranks

    def contiguous(self) -> Ranks:
        return np.tile(
            np.repeat(np.arange(self.sizes.size), self.sizes), (self.problem.num_layers, 1)
        )

    def kept_by_layer(self, ranks: Ranks) -> Floats:
        """[L] co-activation within ranks, both ways."""
        same = ranks[:, :, None] == ranks[:, None, :]
        kept: Floats = (self.weights.together * same).sum(axis=(1, 2))
        return kept

    def kept(self, ranks: Ranks) -> float:
        """Share of the pairs that stays within ranks."""
        flow, together = self.weights.flow, self.weights.together
        if len(flow):
            return float((flow * (ranks[:-1, :, None] == ranks[1:, None, :])).sum())
        return float(self.kept_by_layer(ranks).sum()) / 2 if len(together) else 0.0

    def imbalance(self, ranks: Ranks) -> float:
        """What the cap is about."""
        return imbalance_of_loads(self.problem, _placement(self.problem, ranks))


def _placement(problem: Problem, ranks: Ranks) -> NDArray[np.int64]:
    return fill(problem, np.argsort(ranks, axis=1, kind="stable"))

"""Lower bounds on span and messages by choosing a set of experts for each rank.

Problem: one layer, s = E / G experts on each of G ranks. Let c_g(S) be the tokens that use any
expert of the set S and whose home is not rank g (span: no token has a home).

    minimise  sum over g, S of c_g(S) x_gS
    (1)  sum over g, S with i in S of x_gS = 1      every expert i is somewhere
    (2)  sum over S of x_gS = 1                     every rank has a set

Every placement is such a choice, so the linear relaxation is a lower bound, and so is, for any
prices u of experts and v of ranks,

    sum of u + sum of v + G x (least c_g(S) - u(S) - v_g over all g and |S| = s).

Search: column generation (Gilmore and Gomory, Operations Research 9, 1961) with prices kept near
the best ones so far (the boxes of du Merle, Villeneuve, Desrosiers and Hansen, Discrete Mathematics
194, 1999). The least reduced cost is found exactly by branch and bound (`columns_kernels`), so each
step gives a bound; prices are rounded to multiples of 2^-10, which makes its arithmetic exact. When
the branch and bound takes too long, only reduced costs below a share of the bound are looked for,
which lowers the bound by that share; or the step gives none.

Complexity: exponential in s in the worst case. On routing as real models have it a step takes 10^3
to 10^6 nodes up to 64 experts in sets of 8. Source: placer; set partitioning by column generation
is standard in vehicle routing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import columns_kernels as kernels
from solvers.bounds.token_sets import TokenSets

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MAX_STEPS = 60
MAX_WORK = 300_000_000  # of one branch and bound; some seconds
_GRID = 1024.0
_TOLERANCE = 5e-4  # relative, of the bound against the linear relaxation
_BOX = 0.03  # of a mean price
_FOUND = 256
_SEEDS = 12
_SLACK = (_TOLERANCE / 2, 0.1, 0.3)  # of the bound, given up where proofs take too long
_PATIENCE = 4  # steps without a gain of the tolerance end the search


class Columns:
    """The sets found so far for one layer, and the best bound on its tokens together.

    Attributes:
        best: what is proven, in tokens; -inf: nothing.
        done: whether more steps are worth while.
        members: [M, s], rank: [M], cost: [M] the sets found so far.
    """

    def __init__(
        self, sets: TokenSets, start: Integers, by_home: bool, max_work: int = MAX_WORK
    ) -> None:
        """
        Args:
            sets: the layer's tokens.
            start: [G, s] a good placement.
            by_home: whether tokens have homes, so that ranks differ.
            max_work: limit on a branch and bound.
        """
        self.sets, self.by_home, self.max_work = sets, by_home, max_work
        self.num_ranks, self.size = start.shape
        self.first, self.users = sets.users()
        self.pairs = sets.together()
        self.kinds = self.num_ranks if by_home else 1
        self.each = self.num_ranks // self.kinds
        self.at_home: Floats = np.zeros((self.kinds, sets.num_experts))
        if by_home:
            number, column = np.nonzero(sets.experts >= 0)
            key = sets.home[number] * sets.num_experts + sets.experts[number, column]
            counted = np.bincount(key, sets.weight[number], minlength=self.at_home.size)
            self.at_home = counted.reshape(self.at_home.shape).astype(np.float64)
        overlap = self.pairs - np.diag(np.diag(self.pairs))
        most = -np.sort(-overlap, axis=1)[:, : self.size - 1].sum(axis=1)
        self.order = np.argsort(-most, kind="stable")
        self.members = np.zeros((0, self.size), np.int64)
        self.rank = np.zeros(0, np.int64)
        self.cost = np.zeros(0)
        self.add(start, np.arange(self.num_ranks) % self.kinds)
        self.centre = self._shares(start)
        self.box = np.full(sets.num_experts, _BOX * float(self.centre.mean()) + 1 / _GRID)
        self.best, self.steps, self.idle, self.slack = -np.inf, 0, 0, 0
        self.done = False

    def add(self, members: Integers, rank: Integers) -> None:
        """Take in sets [M, s] of experts for the ranks [M]."""
        rows = np.column_stack([rank, np.sort(members, axis=1)])
        rows = np.unique(np.concatenate([np.column_stack([self.rank, self.members]), rows]), axis=0)
        self.rank, self.members = rows[:, 0].copy(), np.ascontiguousarray(rows[:, 1:])
        self.cost = self._costs(self.members, self.rank)

    def step(self, stop: Integers) -> None:
        """One round of prices, sets and, if the branch and bound is completed, a bound.

        Args:
            stop: [1] not 0 once the time is over.
        """
        solved = self._master()
        if solved is None:
            self.done = True
            return
        relaxed, price, rank_price, inside = solved
        self.steps += 1
        limit = -_SLACK[self.slack] * relaxed / self.num_ranks
        members, rank = self._improved(price, rank_price)
        reduced = self._costs(members, rank) - price[members].sum(axis=1) - rank_price[rank]
        found, found_rank = np.zeros((_FOUND, self.size), np.int64), np.zeros(_FOUND, np.int64)
        least, num_found, complete = kernels.cheapest_set(
            self.order, price, rank_price, self.sets.experts, self.sets.home, self.sets.weight,
            self.first, self.users, self.pairs, self.at_home, self.size,
            min(limit, float(reduced.min())), self.max_work, stop, found, found_rank,
        )  # fmt: skip
        if not complete:
            self.slack += 1
            self.done = stop[0] != 0 or self.slack == len(_SLACK) or self.best > -np.inf
            return
        self.add(
            np.concatenate([members[reduced < 0], found[:num_found]]),
            np.concatenate([rank[reduced < 0], found_rank[:num_found]]),
        )
        dual = float(price.sum() + self.each * rank_price.sum() + self.num_ranks * least)
        self.idle = 0 if dual > self.best + _TOLERANCE * relaxed else self.idle + 1
        if dual > self.best:
            self.best, self.centre = dual, price
            if not inside:
                self.box = self.box * 2
        else:
            self.box = self.box / 2
        met = inside and relaxed - self.best <= 2 * _SLACK[self.slack] * relaxed
        self.done = met or self.idle >= _PATIENCE or self.steps >= MAX_STEPS

    def _costs(self, members: Integers, rank: Integers) -> Floats:
        ranks = rank if self.by_home else np.full(rank.size, -2)
        found: Floats = kernels.costs(
            members, ranks, self.first, self.users, self.sets.home, self.sets.weight
        )
        return found

    def _shares(self, start: Integers) -> Floats:
        """[E] what the tokens pay for each expert: a rank's cost is shared by those it serves."""
        sets = self.sets
        rank_of = np.zeros(sets.num_experts + 1, np.int64)
        rank_of[start] = np.arange(self.num_ranks)[:, None]
        used = sets.experts >= 0
        rank = np.where(used, rank_of[sets.experts], -1)
        same = (rank[:, :, None] == rank[:, None, :]) & used[:, None, :]
        paid = used & (rank != sets.home[:, None])
        share = np.where(paid, 1 / np.maximum(1, same.sum(axis=2)), 0.0) * sets.weight[:, None]
        total: Floats = np.bincount(
            sets.experts[used], share[used], minlength=sets.num_experts
        ).astype(np.float64)
        return total

    def _master(self) -> tuple[float, Floats, Floats, bool] | None:
        """The relaxation over the known sets: value, prices, and whether the box is not felt.

        None where HiGHS has numerical trouble.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix

        num_sets, num_experts = len(self.cost), self.sets.num_experts
        numbers, experts = np.arange(num_sets), np.arange(num_experts)
        rows = np.concatenate([self.members.ravel(), num_experts + self.rank, experts, experts])
        columns = np.concatenate(
            [
                np.repeat(numbers, self.size),
                numbers,
                num_sets + experts,
                num_sets + num_experts + experts,
            ]
        )
        values = np.ones(rows.size)
        values[-num_experts:] = -1.0
        matrix: Any = csr_matrix((values, (rows, columns)))
        solved: Any = linprog(
            np.concatenate([self.cost, self.centre + self.box, self.box - self.centre]),
            A_eq=matrix,
            b_eq=np.concatenate([np.ones(num_experts), np.full(self.kinds, float(self.each))]),
            method="highs",
        )
        if solved.status != 0:
            return None
        prices = np.rint(solved.eqlin.marginals * _GRID) / _GRID
        inside = bool(solved.x[num_sets:].sum() <= 1e-9)
        return float(solved.fun), prices[:num_experts], prices[num_experts:], inside

    def _improved(self, price: Floats, rank_price: Floats) -> tuple[Integers, Integers]:
        """Sets of little reduced cost, by swaps from the best known ones."""
        reduced = self.cost - price[self.members].sum(axis=1) - rank_price[self.rank]
        seeds = np.argsort(reduced, kind="stable")[:_SEEDS]
        members, rank = self.members[seeds].copy(), self.rank[seeds]
        for row, at in zip(members, rank, strict=True):
            kernels.descend(
                row, at if self.by_home else -2, price, self.first, self.users, self.sets.home,
                self.sets.weight,
            )  # fmt: skip
        return members, rank

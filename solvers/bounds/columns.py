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

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import columns_kernels as kernels
from solvers.bounds.master import Master
from solvers.bounds.token_sets import TokenSets

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MAX_STEPS = 60
MAX_WORK = 60_000_000  # of one branch and bound; a second or two
_GRID = 1024.0
_TOLERANCE = 5e-4  # relative, of the bound against the linear relaxation
_BOX = 0.03  # of a mean price
_FOUND = 256
_SEEDS, _SMALL = (1, 8), 4  # sets to swap from, for small and larger ones
_SLACK = (_TOLERANCE / 2, 0.1, 0.3)  # of the bound, given up where proofs take too long
_EXACT = 1e-9  # relative, that a load may be above what is allowed: rounding excludes no set
STEP_S, PAIR_S = 0.003, 2.5e-8  # nominal: of a step, and of a pair of candidates in it
_PATIENCE = 8  # steps without a gain of the tolerance end the search


@dataclass(frozen=True, eq=False)
class RankLoads:
    """What a rank's load does to the imbalance of its layer.

    The imbalance is a mean over scenarios of the busiest rank's load, which is at least that of
    each rank, and at least a floor that no placement is below. So a layer's imbalance is at least

        sum over scenarios of max(share of S, floor)

    for the set S of each of its ranks.

    Attributes:
        share: [C, E] load of an expert, in units of the scenario's mean rank load x its weight.
        floor: [C] least possible load of the busiest rank, in the same units.
    """

    share: Floats
    floor: Floats

    @staticmethod
    def none(num_experts: int) -> RankLoads:
        """No scenario."""
        return RankLoads(np.zeros((0, num_experts)), np.zeros(0))

    def busiest(self, members: Integers) -> Floats:
        """[M] imbalance that a rank alone makes if it holds one of the sets [M, s]."""
        load = self.share[:, members].sum(axis=2)
        busiest: Floats = np.maximum(load, self.floor[:, None]).sum(axis=0)
        return busiest


class LayerTokens:
    """The tokens of one layer, as column generation needs them.

    Attributes:
        sets: the tokens.
        by_home: whether they have homes, so that ranks differ.
        kinds: ranks that differ; each: ranks of a kind.
        first, users: of `TokenSets.users`.
        pairs: [E, E] tokens that use both, its diagonal those that use one.
        at_home: [kinds, E] tokens that use an expert and whose home is the rank.
        order: [E] experts that overlap most with others first.
        loads: what the cap on imbalance is about.
    """

    def __init__(
        self,
        sets: TokenSets,
        num_ranks: int,
        by_home: bool,
        loads: RankLoads | None = None,
    ) -> None:
        self.sets, self.num_ranks, self.by_home = sets, num_ranks, by_home
        self.size = sets.num_experts // num_ranks
        self.first, self.users = sets.users()
        self.pairs = sets.together()
        self.kinds = num_ranks if by_home else 1
        self.each = num_ranks // self.kinds
        self.at_home: Floats = np.zeros((self.kinds, sets.num_experts))
        if by_home:
            number, column = np.nonzero(sets.experts >= 0)
            key = sets.home[number] * sets.num_experts + sets.experts[number, column]
            counted = np.bincount(key, sets.weight[number], minlength=self.at_home.size)
            self.at_home = counted.reshape(self.at_home.shape).astype(np.float64)
        overlap = self.pairs - np.diag(np.diag(self.pairs))
        most = -np.sort(-overlap, axis=1)[:, : self.size - 1].sum(axis=1)
        self.order = np.argsort(-most, kind="stable")
        self.loads = RankLoads.none(sets.num_experts) if loads is None else loads

    def costs(self, members: Integers, rank: Integers) -> Floats:
        """[M] tokens that use the sets [M, s] and are not at the ranks [M]."""
        ranks = rank if self.by_home else np.full(rank.size, -2)
        found: Floats = kernels.costs(
            members, ranks, self.first, self.users, self.sets.home, self.sets.weight
        )
        return found

    def shares(self, start: Integers) -> Floats:
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


class Columns:
    """The sets found so far for one layer, and the best bound on its tokens together.

    Attributes:
        best: what is proven, in tokens; -inf: nothing.
        done: whether more steps are worth while.
        work: nominal seconds spent.
        members: [M, s], rank: [M], cost: [M] the sets found so far.
    """

    def __init__(
        self,
        layer: LayerTokens,
        starts: Sequence[Integers],
        most: float = np.inf,
        max_work: int = MAX_WORK,
    ) -> None:
        """
        Args:
            layer: the tokens.
            starts: [G, s] good placements, the best one first.
            most: imbalance that a rank may make; sets that make more are left out.
            max_work: limit on a branch and bound.
        """
        self.layer, self.most, self.max_work = layer, most * (1 + _EXACT), max_work
        self.num_ranks, self.size = layer.num_ranks, layer.size
        self.members = np.zeros((0, self.size), np.int64)
        self.rank = np.zeros(0, np.int64)
        self.cost = np.zeros(0)
        ranks = np.arange(self.num_ranks) % layer.kinds
        self.add(np.concatenate(starts), np.tile(ranks, len(starts)))
        self.centre = layer.shares(starts[0])
        self.box = self._first_box()
        self.best, self.steps, self.idle, self.slack = -np.inf, 0, 0, 0
        self.work, self.done = 0.0, False
        self.master: Master | None = None

    def limited(self, most: float) -> Columns:
        """Columns for another limit on imbalance, that start from the sets and prices here."""
        found = copy(self)
        found.most = most * (1 + _EXACT)
        allowed = self.layer.loads.busiest(self.members) <= found.most
        found.members, found.rank = self.members[allowed], self.rank[allowed]
        found.cost = self.cost[allowed]
        found.box = self._first_box()
        found.best, found.steps, found.idle, found.slack = -np.inf, 0, 0, 0
        found.work, found.done, found.master = 0.0, False, None
        return found

    def _first_box(self) -> Floats:
        return np.full(self.centre.size, _BOX * float(self.centre.mean()) + 1 / _GRID)

    def add(self, members: Integers, rank: Integers) -> None:
        """Take in sets [M, s] of experts for the ranks [M], but for those with too much load."""
        allowed = self.layer.loads.busiest(members) <= self.most
        rows = np.column_stack([rank, np.sort(members, axis=1)])[allowed]
        known = np.column_stack([self.rank, self.members])
        _, first = np.unique(np.concatenate([known, rows]), axis=0, return_index=True)
        rows = rows[np.sort(first[first >= len(known)]) - len(known)]
        members, rank = np.ascontiguousarray(rows[:, 1:]), rows[:, 0].copy()
        self.cost = np.concatenate([self.cost, self.layer.costs(members, rank)])
        self.rank = np.concatenate([self.rank, rank])
        self.members = np.concatenate([self.members, members])

    def step(self, stop: Integers) -> None:
        """One round of prices, sets and, if the branch and bound is completed, a bound.

        Args:
            stop: [1] not 0 once the time is over.
        """
        layer, sets, loads = self.layer, self.layer.sets, self.layer.loads
        self.work += STEP_S
        solved = self._solve()
        if solved is None:
            self.done = True
            return
        relaxed, price, rank_price, inside = solved
        self.steps += 1
        limit = -_SLACK[self.slack] * relaxed / self.num_ranks
        members, rank = self._improved(price, rank_price)
        reduced = layer.costs(members, rank) - price[members].sum(axis=1) - rank_price[rank]
        found, found_rank = np.zeros((_FOUND, self.size), np.int64), np.zeros(_FOUND, np.int64)
        least, num_found, complete, work = kernels.cheapest_set(
            layer.order, price, rank_price, sets.experts, sets.home, sets.weight,
            layer.first, layer.users, layer.pairs, layer.at_home, loads.share, loads.floor,
            self.most, self.size, min(limit, float(reduced.min(initial=0.0))), self.max_work, stop,
            found, found_rank,
        )  # fmt: skip
        self.work += work * PAIR_S
        if not complete:
            self.slack += 1
            self.done = stop[0] != 0 or self.slack == len(_SLACK) or self.best > -np.inf
            return
        self.add(
            np.concatenate([members[reduced < 0], found[:num_found]]),
            np.concatenate([rank[reduced < 0], found_rank[:num_found]]),
        )
        dual = float(price.sum() + layer.each * rank_price.sum() + self.num_ranks * least)
        self.idle = 0 if dual > self.best + _TOLERANCE * relaxed else self.idle + 1
        if dual > self.best:
            self.best, self.centre = dual, price
            if not inside:
                self.box = self.box * 2
        else:
            self.box = self.box / 2
        met = inside and relaxed - self.best <= 2 * _SLACK[self.slack] * relaxed
        self.done = met or self.idle >= _PATIENCE or self.steps >= MAX_STEPS

    def _solve(self) -> tuple[float, Floats, Floats, bool] | None:
        """What `Master.solve` says of the known sets, prices on the grid."""
        if self.master is None:
            dear = float(self.layer.sets.weight.sum())
            self.master = Master(self.centre.size, self.layer.kinds, self.layer.each, dear)
        new = slice(self.master.num_sets, None)
        self.master.add(self.members[new], self.rank[new], self.cost[new])
        solved = self.master.solve(self.centre, self.box)
        if solved is None:
            return None
        relaxed, price, rank_price, inside = solved
        return relaxed, np.rint(price * _GRID) / _GRID, np.rint(rank_price * _GRID) / _GRID, inside

    def _improved(self, price: Floats, rank_price: Floats) -> tuple[Integers, Integers]:
        """Sets of little reduced cost, by swaps from the best known ones."""
        reduced = self.cost - price[self.members].sum(axis=1) - rank_price[self.rank]
        seeds = np.argsort(reduced, kind="stable")[: _SEEDS[self.size > _SMALL]]
        members, rank = self.members[seeds].copy(), self.rank[seeds]
        layer, sets, loads = self.layer, self.layer.sets, self.layer.loads
        for row, at in zip(members, rank, strict=True):
            kernels.descend(
                row, at if layer.by_home else -2, price, layer.first, layer.users, sets.home,
                sets.weight, loads.share, loads.floor, self.most,
            )  # fmt: skip
        return members, rank

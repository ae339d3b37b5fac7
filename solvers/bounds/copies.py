"""Lower bounds on span and messages where ranks have room for copies: sets of experts, priced.

Problem: one layer, G ranks of s slots, G s = E + spare. Let R be the experts with two copies or
more; each takes a spare slot, so R has at most `spare` of them. Rank g holds the set S_g. A token t
with experts K_t and home h sends a message to each rank but h that serves it.

A bound without R. Let an expert outside R pay 1 for each of its tokens, one in R some a_te >= 0,
x_tg the sum of what those in S_g and K_t pay, and

    c_g(S_g) = sum of min(1, x_tg) over the tokens whose home is not g,   A_e = sum of a_te over t.

Whatever R is, and whichever copies serve, the messages are at least

    sum over g of ( c_g(S_g) - A(S_g in R) )  +  A(R).

For a token, the last two terms take off a_te for each copy that does not serve it. A rank that
serves it, but for its home, costs 1, which is min(1, x) or more. One that does not has only copies
of its experts, x in all, that do not serve it: min(1, x) - x <= 0. Its home: 0 less something.

Prices. Experts outside R are held once, so for any u the sum of u outside R, less u(S_g outside R)
over all g, is 0. An expert in R is held n >= 2 times, so for any p_e >= A_e

    A_e - n A_e  =  2 p_e - A_e - n p_e  +  (n - 2) (p_e - A_e)  >=  2 p_e - A_e - n p_e.

Together: no placement has less messages than

    min over R of ( u(outside R) + 2 p(R) - A(R) )
    +  sum over g of the least c_g(S) - u(S outside R) - p(S in R) over |S| = s and R,

where R may be another one for each rank, with at most `spare` experts. (A placement with empty
slots has as many less in R, and a copy more costs c_g(S) no more than A_e <= p_e.) For span no
token has a home.

Search: ascent on a, u and p along averaged subgradients (Polyak's steps; Held, Wolfe and Crowder,
Mathematical Programming 6, 1974), as if the sets known so far were all. Swaps and, every few
rounds, an exact branch and bound add others (`copies_kernels`); only the latter gives bounds.
Prices are multiples of 2^-10 and all else counts tokens, so it calculates in integers. A branch and
bound that takes too long is done again with more slack.

Complexity: exponential in s in the worst case. Source: placer; without spare slots R is empty, and
the bound is that of `solvers.bounds.columns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import copies_kernels as kernels
from solvers.bounds.copies_kernels import UNIT
from solvers.bounds.token_sets import TokenSets

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MAX_WORK = 400_000_000  # of one branch and bound; some six seconds
PAIR_S, LOOK_S, STEP_S = 1.6e-8, 1.5e-9, 5e-4  # nominal
_KNOWN = 100  # sets to keep
_STEPS = 5  # of a round
_FIRST_STRIDE, _LEAST_STRIDE = 0.1, 4e-3  # of Polyak's step
_SHORTER, _PATIENCE = 0.6, 4  # rounds without a gain before strides get shorter
_INERTIA = 0.7  # of the averaged subgradient
_SLACK = (2e-3, 2e-2, 0.1)  # of the layer's traffic, given up where proofs take too long
_WORK, _GROWTH = 750.0, 0.55
_MET = 1e-4  # relative, of the bound and the traffic of the first placement
_FIRST_PROOF, _RAREST_PROOF = 8, 15  # rounds


def expected_proof_s(num_experts: int, size: int) -> float:
    """Nominal seconds that a branch and bound may take, by what was seen with real routing."""
    number = comb(num_experts, size) * 2.0**size
    return float(_WORK * number**_GROWTH * PAIR_S)


@dataclass(frozen=True, eq=False)
class CopyTokens:
    """The tokens of one layer, by their experts.

    Attributes:
        experts: [N, K] ids, -1 = unused ones last.
        weight: [N] tokens.
        home_first, home_rank, home_weight: [N + 1] where the homes of each begin, and how many
            tokens have them; none where homes do not matter.
        first, users, column: [E + 1] where each expert's tokens begin, their numbers and in which
            column they use it.
        order: [E] experts that overlap most with others first.
        num_ranks, size: G and s.
        by_home: whether ranks differ.
    """

    experts: Integers
    weight: Integers
    home_first: Integers
    home_rank: Integers
    home_weight: Integers
    first: Integers
    users: Integers
    column: Integers
    order: Integers
    num_ranks: int
    size: int
    by_home: bool

    @staticmethod
    def of(sets: TokenSets, num_ranks: int, size: int, by_home: bool) -> CopyTokens:
        experts, number = np.unique(sets.experts, axis=0, return_inverse=True)
        number = number.ravel()
        weight = np.bincount(number, sets.weight).astype(np.float64)
        merged = TokenSets(sets.num_experts, experts, np.full(len(experts), -1), weight)
        first, users = merged.users()
        expert = np.repeat(np.arange(sets.num_experts), np.diff(first))
        order = np.argsort(number, kind="stable")
        count = np.bincount(number) if by_home else np.zeros(len(experts), np.int64)
        pairs = merged.together()
        overlap = pairs - np.diag(np.diag(pairs))
        most = -np.sort(-overlap, axis=1)[:, : size - 1].sum(axis=1)
        return CopyTokens(
            experts=np.ascontiguousarray(experts),
            weight=weight.astype(np.int64),
            home_first=np.concatenate([[0], np.cumsum(count)]),
            home_rank=sets.home[order] if by_home else np.zeros(0, np.int64),
            home_weight=sets.weight[order].astype(np.int64) if by_home else np.zeros(0, np.int64),
            first=first,
            users=users,
            column=(experts[users] == expert[:, None]).argmax(axis=1),
            order=np.argsort(-most, kind="stable"),
            num_ranks=num_ranks,
            size=size,
            by_home=by_home,
        )

    @property
    def num_experts(self) -> int:
        return self.first.size - 1

    @property
    def spare(self) -> int:
        return self.num_ranks * self.size - self.num_experts

    @property
    def kinds(self) -> int:
        """Ranks that differ."""
        return self.num_ranks if self.by_home else 1

    @property
    def homes(self) -> tuple[Integers, Integers, Integers]:
        return self.home_first, self.home_rank, self.home_weight

    def away(self) -> Integers:
        """[kinds, N] tokens whose home is not the rank."""
        found = np.tile(self.weight, (self.kinds, 1))
        row = np.repeat(np.arange(len(self.weight)), np.diff(self.home_first))
        np.subtract.at(found, (self.home_rank, row), self.home_weight)
        return found

    def shares(self, slots: Integers) -> Floats:
        """[N, K] what the experts of each token pay in the placement [G, s], -1 = empty.

        A message is shared by the experts that are served by it. Where several ranks hold an
        expert, the first that the token uses anyway serves it.
        """
        held = np.zeros((self.num_experts + 1, self.num_ranks), bool)
        held[slots, np.arange(self.num_ranks)[:, None]] = True
        held[-1] = False
        rows = np.repeat(np.arange(len(self.weight)), np.diff(self.home_first))
        experts, home, weight = self.experts, np.full(len(self.weight), -1), self.weight
        if self.by_home:
            experts, home, weight = self.experts[rows], self.home_rank, self.home_weight
        else:
            rows = np.arange(len(self.weight))
        may = held[experts]  # [M, K, G]
        used = experts >= 0
        number = np.arange(len(experts))
        at_home = (home >= 0)[:, None] & may[number, :, home]
        single = used & (may.sum(axis=2) == 1) & ~at_home
        rank = np.where(at_home, home[:, None], np.where(single, may.argmax(axis=2), -1))
        for k in range(experts.shape[1]):
            touched = np.zeros((len(experts), self.num_ranks), bool)
            row, column = np.nonzero(rank >= 0)
            touched[row, rank[row, column]] = True
            left = used[:, k] & (rank[:, k] < 0)
            near = may[:, k] & touched
            where = np.where(near.any(axis=1), near.argmax(axis=1), may[:, k].argmax(axis=1))
            rank[left, k] = where[left]
        same = (rank[:, :, None] == rank[:, None, :]) & used[:, None, :]
        paid = used & (rank != home[:, None])
        share = np.where(paid, 1 / np.maximum(1, same.sum(axis=2)), 0.0)
        total = np.zeros(self.experts.shape)
        np.add.at(total, rows, share * weight[:, None])
        return total / self.weight[:, None]


@dataclass(frozen=True, eq=False)
class _Prices:
    """What experts pay as copies, [N, K], and what they take off alone and beyond, [E] each."""

    pay: Floats
    alone: Floats
    extra: Floats


class Copies:
    """The bound on one layer's span or messages, and the sets it is made from.

    Attributes:
        best: what is proven, in tokens; -inf: nothing.
        work: nominal seconds spent.
        done: whether more rounds are worth while.
    """

    def __init__(self, tokens: CopyTokens, start: Integers) -> None:
        """
        Args:
            tokens: of the layer.
            start: a good placement [G, s], -1 = empty.
        """
        self.tokens = tokens
        self.away = tokens.away()
        pay = tokens.shares(start)
        paid = self._paid(pay * tokens.weight[:, None])
        self.target = float(paid.sum())
        self.prices = self.centre = _Prices(pay, paid, np.zeros_like(paid))
        self.slope = _Prices(np.zeros_like(pay), np.zeros_like(paid), np.zeros_like(paid))
        self.sets = np.zeros((0, tokens.size), np.int64)
        self.modes = np.zeros((0, tokens.size), np.int64)
        self._add_placement(start)
        self.best, self.work, self.done = -np.inf, 0.0, self.target <= 0
        self.stride, self.idle, self.slack = _FIRST_STRIDE, 0, 0
        self.rounds, self.next_proof = 0, _FIRST_PROOF

    def _add_placement(self, slots: Integers) -> None:
        copies = np.bincount(slots[slots >= 0], minlength=self.tokens.num_experts)
        sets, modes = slots.copy(), (copies[slots] > 1).astype(np.int64)
        for row, mode in zip(sets, modes, strict=True):
            empty = np.flatnonzero(row < 0)
            others = np.setdiff1d(np.arange(self.tokens.num_experts), row)
            row[empty], mode[empty] = others[: empty.size], 1
        self._add(sets, modes)

    def _add(self, sets: Integers, modes: Integers) -> None:
        """Keep sets [M, s], the newest first."""
        order = np.argsort(sets, axis=1)
        sets = np.take_along_axis(sets, order, axis=1)
        modes = np.take_along_axis(modes, order, axis=1)
        rows = np.concatenate(
            [np.concatenate([sets, self.sets]), np.concatenate([modes, self.modes])], axis=1
        )
        _, first = np.unique(rows, axis=0, return_index=True)
        rows = rows[np.sort(first)[:_KNOWN]]
        size = self.tokens.size
        self.sets = np.ascontiguousarray(rows[:, :size])
        self.modes = np.ascontiguousarray(rows[:, size:])

    def _paid(self, amount: NDArray[Any]) -> NDArray[Any]:
        """[E] the sum over tokens of amounts [N, K]."""
        tokens = self.tokens
        used = tokens.experts >= 0
        return np.bincount(tokens.experts[used], amount[used], minlength=tokens.num_experts)

    def round(self, allowed: float, stop: Integers) -> None:
        """Steps of the prices on the known sets, new sets, and now and then a proof.

        Args:
            allowed: nominal seconds that a proof may take.
            stop: [1] not 0 once the time is over.
        """
        for _ in range(_STEPS):
            self._step()
        self.rounds += 1
        exact = _Exact(self.tokens, self.prices, self._paid)
        costs = exact.costs(self.sets, self.modes)
        self.work += (_STEPS + 1) * (STEP_S + costs.size * 1e-6)
        at = costs.argmin(axis=0)
        sets, modes = self.sets[at].copy(), self.modes[at].copy()
        if self.rounds < self.next_proof:
            self.work += LOOK_S * exact.descend(sets, modes, self.away)
            self._add(sets, modes)
            return
        least = costs.min(axis=0)
        given_up = int(_SLACK[self.slack] * self.target * UNIT / self.tokens.num_ranks)
        max_work = int(min(MAX_WORK, max(0.0, allowed) / PAIR_S))
        complete, work = exact.search(sets, modes, least, given_up, max_work, stop)
        self._add(sets, modes)
        self.work += work * PAIR_S
        if not complete:
            self.slack += 1
            cut_short = stop[0] != 0 or max_work < MAX_WORK
            self.done = cut_short or self.best > -np.inf or self.slack == len(_SLACK)
            return
        cheap = (_STEPS + 1) * (STEP_S + costs.size * 1e-6)
        self.next_proof = self.rounds + int(np.clip(work * PAIR_S / cheap / 4, 1, _RAREST_PROOF))
        each = self.tokens.num_ranks // self.tokens.kinds
        proven = (exact.base + each * int((least - given_up).sum())) / UNIT
        if proven > self.best:
            self.best, self.centre, self.idle = proven, self.prices, 0
            self.done = self.best >= self.target * (1 - _MET)
            return
        self.idle += 1
        if self.idle == _PATIENCE:
            self.idle, self.prices = 0, self.centre
            self.stride *= _SHORTER
            self.slope = _Prices(*(np.zeros_like(part) for part in _parts(self.slope)))
            self.done = self.stride < _LEAST_STRIDE

    def _step(self) -> None:
        tokens, prices = self.tokens, self.prices
        exact = _Exact(tokens, prices, self._paid)
        costs = exact.costs(self.sets, self.modes)
        each = tokens.num_ranks // tokens.kinds
        known = (exact.base + each * int(costs.min(axis=0).sum())) / UNIT
        if tokens.by_home:
            at = costs.argmin(axis=0)
        else:  # of ranks that are alike each takes another of the best sets
            at = np.argsort(costs[:, 0], kind="stable")[: tokens.num_ranks]
            at = np.resize(at, tokens.num_ranks)
        sets, modes = self.sets[at], self.modes[at]
        pay = kernels.slopes(
            sets, modes, tokens.by_home, exact.several, tokens.weight, tokens.experts,
            exact.pay, *tokens.homes,
        )  # fmt: skip
        held = np.stack(
            [np.bincount(sets[modes == m], minlength=tokens.num_experts) for m in range(2)]
        )
        scale = self.target / tokens.num_experts  # of the price of an expert
        now = _Prices(
            pay,
            (~exact.several - held[0]) * scale,
            (2 * exact.several - held[1]) * scale,
        )
        self.slope = _Prices(
            *(
                _INERTIA * old + (1 - _INERTIA) * new
                for old, new in zip(_parts(self.slope), _parts(now), strict=True)
            )
        )
        slope = self.slope
        length = float((tokens.weight[:, None] * slope.pay**2).sum())
        length += float((slope.alone**2 + slope.extra**2).sum()) / scale
        stride = self.stride * max(0.0, self.target - known) / max(1e-300, length)
        self.prices = _Prices(
            np.clip(prices.pay + stride * slope.pay, 0.0, 1.0),
            prices.alone + stride * slope.alone,
            np.maximum(0.0, prices.extra + stride * slope.extra),
        )


def _parts(prices: _Prices) -> tuple[Floats, Floats, Floats]:
    return prices.pay, prices.alone, prices.extra


class _Exact:
    """Prices as integers, and what is calculated with them.

    Attributes:
        pay: [N, K], price: [2, E] alone and as copies.
        several: [E] the experts that R consists of at these prices.
        base: the first line of the bound.
    """

    def __init__(self, tokens: CopyTokens, prices: _Prices, paid: Any) -> None:
        self.tokens = tokens
        self.pay = np.rint(prices.pay * UNIT).astype(np.int64)
        total = paid(self.pay * tokens.weight[:, None]).astype(np.int64)
        alone = np.rint(prices.alone * UNIT).astype(np.int64)
        copy = total + np.rint(prices.extra * UNIT).astype(np.int64)
        self.price = np.stack([alone, copy])
        self.user_pay = self.pay[tokens.users, tokens.column]
        gain = 2 * copy - total - alone
        chosen = np.argsort(gain, kind="stable")[: tokens.spare]
        chosen = chosen[gain[chosen] < 0]
        self.several = np.zeros(tokens.num_experts, bool)
        self.several[chosen] = True
        self.base = int(alone.sum() + gain[chosen].sum())

    def costs(self, sets: Integers, modes: Integers) -> Integers:
        """[M, kinds] cost less prices of sets [M, s]."""
        tokens = self.tokens
        found: Integers = kernels.costs(
            sets, modes, self.price, tokens.weight, tokens.first, tokens.users, self.user_pay,
            *tokens.homes, tokens.kinds,
        )  # fmt: skip
        return found

    def descend(self, sets: Integers, modes: Integers, away: Integers) -> int:
        """Improve the set of each kind of rank in place; tokens that were looked at."""
        tokens = self.tokens
        return sum(
            kernels.descend(
                row, mode, rest, self.price, tokens.first, tokens.users, self.user_pay,
                min(tokens.spare, tokens.size),
            )
            for row, mode, rest in zip(sets, modes, away, strict=True)
        )  # fmt: skip

    def search(
        self, sets: Integers, modes: Integers, least: Integers, slack: int, max_work: int,
        stop: Integers,
    ) -> tuple[bool, int]:  # fmt: skip
        """The best set of each kind of rank, see `copies_kernels.least_sets`."""
        tokens = self.tokens
        complete, work = kernels.least_sets(
            tokens.order, self.price, tokens.weight, tokens.experts, self.pay, tokens.first,
            tokens.users, self.user_pay, *tokens.homes, tokens.size, tokens.spare, slack, max_work,
            stop, least, sets, modes,
        )  # fmt: skip
        return complete, work

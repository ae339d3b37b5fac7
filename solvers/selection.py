"""One candidate per layer: least traffic under the caps, and the prices at which layers trade.

Problem: from a pool of placements of each layer choose one, so that what the workloads' traffic
comes to (mean, worst, or mean of the worse half) is least, imbalance keeps its cap, and moves and
slots their budgets. It is a multiple-choice knapsack. Its linear relaxation, the master problem of
a column generation (Dantzig and Wolfe, Operations Research 8(1), 1960), gives the prices at which
new candidates are worth their while (by HiGHS).

A constraint that no choice keeps is paid for instead, the cap at ELASTIC_PRICE, a move or a slot
too many at BUDGET_PRICE: the choice then comes as near to them as the pools allow, and breaks the
cap rather than a budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.layers import Candidate, Prices
from solvers.problem import Problem, num_worse

ELASTIC_PRICE = 100.0
BUDGET_PRICE = 1e4
BROKEN, TOLERANCE = 1e6, 1e-12
FRACTION = 1e-9
MOST_ROUNDINGS = 4096
MOST_EXCHANGES = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Caps:
    """What a choice must keep, and what imbalance costs beside.

    Attributes:
        imbalance: cap on the mean over layers; None = none.
        floor: price of imbalance in the objective, in messages per token.
        moves, slots: most over all layers; None = any number.
    """

    imbalance: float | None = None
    floor: float = 0.0
    moves: int | None = None
    slots: int | None = None


def choose(pools: Sequence[Sequence[Candidate]], problem: Problem, caps: Caps) -> list[Candidate]:
    """The best candidate of each layer together.

    Without caps and workloads each layer's own best. Else the linear relaxation, whose basic
    solutions mix candidates in no more layers than there are rows; these layers are rounded in all
    ways (up to MOST_ROUNDINGS), and then single layers change their candidate while that pays. What
    is lost against the relaxation is a few layers' share of the mean. Deterministic.
    """
    if _separate(problem, caps):
        return [min(pool, key=lambda c: _cost(c, caps)[0]) for pool in pools]
    program = _Program(pools, problem, caps)
    starts = [program.rounded(program.relaxed().x), program.most_balanced()]
    found = [program.exchanged(start) for start in starts]
    choice = min(
        found, key=lambda choice: float(program.value(program.figures[choice].sum(axis=0)))
    )
    return [program.flat[index] for index in choice]


def prices(pools: Sequence[Sequence[Candidate]], problem: Problem, caps: Caps) -> Prices:
    """The prices at which the best mixture of candidates keeps the caps."""
    count = problem.num_workloads
    if _separate(problem, caps):
        return Prices((1 / count,) * count, (caps.floor / count,) * count)
    program = _Program(pools, problem, caps)
    return program.duals(program.relaxed())


def _separate(problem: Problem, caps: Caps) -> bool:
    """Whether nothing ties the layers together."""
    free = caps.imbalance is None and caps.moves is None and caps.slots is None
    return free and problem.num_workloads == 1


def _cost(candidate: Candidate, caps: Caps) -> Floats:
    """[workloads] what a candidate costs."""
    return candidate.traffic + caps.floor * candidate.imbalance


class _Program:
    """The program: minimise cost x with rows x <= limits, one choice a layer, bounds.

    Variables: a share for each candidate; then t, the cost that counts; for `cvar` its level and
    each workload's excess over it; the same for imbalance; and by how much each cap is broken.
    """

    def __init__(self, pools: Sequence[Sequence[Candidate]], problem: Problem, caps: Caps) -> None:
        self.pools, self.caps, self.problem = pools, caps, problem
        self.flat = flat = [candidate for pool in pools for candidate in pool]
        ends = np.cumsum([len(pool) for pool in pools]).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        layer = np.repeat(np.arange(len(pools)), [len(pool) for pool in pools])
        self.num_choices = len(flat)
        self.num_workloads = problem.num_workloads
        columns = self.num_choices
        self._rows: list[Floats] = []
        self._limits: list[float] = []
        self._lower: list[float] = [0.0] * columns
        self._upper: list[float] = [1.0] * columns
        self._cost: list[float] = [0.0] * columns
        # of each candidate: costs and imbalance [workloads], moves, width
        self.figures = np.array(
            [[*_cost(c, caps), *c.imbalance, c.moves, c.width] for c in flat], np.float64
        )
        costs, loads = np.split(self.figures[:, :-2].T / len(pools), 2)
        self.cost_rows = self._aggregate(costs, price=1.0)
        self.load_rows: slice | None = None
        if caps.imbalance is not None:
            broken = self._column(0.0, np.inf, ELASTIC_PRICE)
            total = self._column(-np.inf, np.inf, 0.0)
            self.load_rows = self._aggregate(loads, into=total)
            self._row({total: 1.0, broken: -1.0}, caps.imbalance)
        self.move_row = self._budget([c.moves for c in flat], caps.moves)
        self.slot_row = self._budget([c.width for c in flat], caps.slots)
        size = len(self._cost)
        self.rows = np.array([np.pad(row, (0, size - row.size)) for row in self._rows])
        self.limits = np.array(self._limits)
        self.cost = np.array(self._cost)
        self.lower, self.upper = np.array(self._lower), np.array(self._upper)
        self.one_each = np.zeros((len(pools), size))
        self.one_each[layer, np.arange(columns)] = 1.0

    def _column(self, lower: float, upper: float, cost: float) -> int:
        self._lower.append(lower)
        self._upper.append(upper)
        self._cost.append(cost)
        return len(self._cost) - 1

    def _row(self, entries: dict[int, float], limit: float, first: Floats | None = None) -> int:
        row = np.zeros(len(self._cost))
        if first is not None:
            row[: first.size] = first
        for column, value in entries.items():
            row[column] = value
        self._rows.append(row)
        self._limits.append(limit)
        return len(self._rows) - 1

    def _aggregate(self, figures: Floats, price: float = 0.0, into: int | None = None) -> slice:
        """Rows that make `into` (a new column at `price`) what `robust` makes of the figures."""
        total = self._column(-np.inf, np.inf, price) if into is None else into
        first = len(self._rows)
        if self.problem.robust == "mean" or self.num_workloads == 1:
            self._row({total: -1.0}, 0.0, figures.mean(axis=0))
        elif self.problem.robust == "worst":
            for figure in figures:
                self._row({total: -1.0}, 0.0, figure)
        else:  # Rockafellar and Uryasev (2000): level + mean excess over it, of the worse ones
            level = self._column(-np.inf, np.inf, 0.0)
            excess = [self._column(0.0, np.inf, 0.0) for _ in figures]
            for column, figure in zip(excess, figures, strict=True):
                self._row({level: -1.0, column: -1.0}, 0.0, figure)
            share = 1 / num_worse(self.num_workloads)
            self._row({level: 1.0, total: -1.0} | dict.fromkeys(excess, share), 0.0)
        return slice(first, len(self._rows))

    def _budget(self, use: Sequence[int], most: int | None) -> int | None:
        if most is None:
            return None
        broken = self._column(0.0, np.inf, BUDGET_PRICE)
        return self._row({broken: -1.0}, float(most), np.array(use, np.float64))

    def relaxed(self) -> Any:
        """The linear relaxation's solution and duals."""
        from scipy.optimize import linprog

        return linprog(
            self.cost,
            A_ub=self.rows,
            b_ub=self.limits,
            A_eq=self.one_each,
            b_eq=np.ones(len(self.pools)),
            bounds=list(zip(self.lower.tolist(), self.upper.tolist(), strict=True)),
            method="highs",
        )

    def value(self, figures: Floats) -> Floats:
        """[...] what sums over layers of `figures` cost; a broken cap outweighs all messages."""
        caps, count, layers = self.caps, self.num_workloads, len(self.pools)
        total = self.problem.aggregate(figures[..., :count] / layers)
        reached = self.problem.aggregate(figures[..., count:-2] / layers)
        for use, most, price, broken in (
            (reached, caps.imbalance, ELASTIC_PRICE, BROKEN),
            (figures[..., -2], caps.moves, BUDGET_PRICE, 10 * BROKEN),
            (figures[..., -1], caps.slots, BUDGET_PRICE, 10 * BROKEN),
        ):
            if most is not None:
                over = use - most
                total = total + price * np.maximum(0.0, over) + broken * (over > TOLERANCE)
        return total

    def rounded(self, share: Floats) -> list[int]:
        """The best of the ways to round the layers that mix candidates: a candidate per layer."""
        options = []
        for first, last in self.spans:
            part = share[first:last]
            mixed = np.nonzero(part > FRACTION)[0] if part.max() < 1 - FRACTION else [part.argmax()]
            options.append([first + int(index) for index in mixed])
        ways = np.array(list(itertools.islice(itertools.product(*options), MOST_ROUNDINGS)))
        best = np.argmin(self.value(self.figures[ways].sum(axis=1)))
        return [int(index) for index in ways[best]]

    def most_balanced(self) -> list[int]:
        """The candidate of each layer with least imbalance.

        With a single workload it keeps the cap if any choice does.
        """
        count = self.num_workloads
        imbalance = self.problem.aggregate(self.figures[:, count:-2])
        return [first + int(np.argmin(imbalance[first:last])) for first, last in self.spans]

    def exchanged(self, choice: list[int]) -> list[int]:
        """A choice that no change of one layer makes better."""
        for _ in range(MOST_EXCHANGES):
            total = self.figures[choice].sum(axis=0)
            best = self.value(total) - 1e-12
            change: tuple[int, int] | None = None
            for layer, (first, last) in enumerate(self.spans):
                tried = total - self.figures[choice[layer]] + self.figures[first:last]
                worth = self.value(tried)
                if worth.min() < best:
                    best, change = worth.min(), (layer, first + int(worth.argmin()))
            if change is None:
                break
            choice[change[0]] = change[1]
        return choice

    def duals(self, solution: Any) -> Prices:
        """The relaxation's prices per layer; costs are means over layers."""
        paid = -solution.ineqlin.marginals
        traffic = self._of_workloads(paid, self.cost_rows)
        traffic = traffic / traffic.sum() if traffic.sum() > 0 else np.full_like(traffic, 1.0)
        imbalance = self.caps.floor * traffic
        if self.load_rows is not None:
            imbalance = imbalance + self._of_workloads(paid, self.load_rows)
        layers = len(self.pools)
        return Prices(
            tuple(traffic.tolist()),
            tuple(np.maximum(imbalance, 0.0).tolist()),
            0.0 if self.move_row is None else float(paid[self.move_row]) * layers,
            0.0 if self.slot_row is None else float(paid[self.slot_row]) * layers,
        )

    def _of_workloads(self, paid: Floats, rows: slice) -> Floats:
        """[workloads] duals of the rows that `_aggregate` made."""
        found: Floats = paid[rows][: self.num_workloads]
        if found.size < self.num_workloads:  # one row for all
            found = np.repeat(found[:1] / self.num_workloads, self.num_workloads)
        return found

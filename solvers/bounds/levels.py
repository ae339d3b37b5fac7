"""A layer's least traffic at each level of imbalance, bounded from below: what a cap costs.

Problem: a cap limits the mean over layers of imbalance, so layers trade with each other. Let f(t)
be the least traffic of a layer among the placements of which no rank makes more imbalance than t.
It falls with t. Cut the levels from the least possible imbalance upwards into intervals. A
placement whose imbalance is between t and t' has at least the traffic f(t'), which column
generation over sets that make at most t' bounds (`solvers.bounds.columns`). So for any price
p >= 0 of imbalance,

    sum over layers of min over intervals (t, t') of (f(t') + p t)  -  p x cap x layers

is at most the traffic of every placement that keeps the cap (weak duality: imbalance beyond the cap
is priced instead of forbidden). The best price is found by bisection, the bound is concave in it.

Search: in each round the best price is computed anew, and every layer works on the interval that
holds its minimum down: a step of its column generation, or, once that has ended, a cut of the
interval in two, whose lower half starts from the columns of the whole. Without a cap there is one
interval, and nothing but its column generation.

Source: placer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.columns import Columns

Floats = NDArray[np.float64]

_NARROW = 2e-3  # of the layer's traffic, that the width of an interval may cost
_FIRST_WIDTH = 0.1  # of the interval below the one without an end
_TIED = 1e-4
_ROUNDING = 1e-12
_DOUBLINGS, _BISECTIONS = 60, 60


@dataclass(eq=False)
class Interval:
    """Imbalance from `low` to `high`, and columns for the latter; None before the first step."""

    low: float
    high: float
    columns: Columns | None = None

    @property
    def proven(self) -> float:
        """Traffic, in tokens."""
        return -np.inf if self.columns is None else self.columns.best


class Levels:
    """The intervals of one layer, by rising imbalance."""

    def __init__(self, start: Columns, cheap: float, cuts: Sequence[float]) -> None:
        """
        Args:
            start: columns without a limit on imbalance.
            cheap: what is known about the layer's traffic anyway.
            cuts: rising levels, the first of which no placement is below.
        """
        self.start, self.cheap, self.lowest = start, cheap, cuts[0]
        self.intervals = [Interval(low, high) for low, high in pairwise([*cuts, np.inf])]

    def lows(self) -> Floats:
        return np.array([interval.low for interval in self.intervals])

    def proven(self) -> Floats:
        """[intervals] traffic, never less than at more imbalance."""
        found = np.array([max(self.cheap, interval.proven) for interval in self.intervals])
        rising: Floats = np.maximum.accumulate(found[::-1])[::-1]
        return rising

    @property
    def work(self) -> float:
        """Nominal seconds spent."""
        return sum(i.columns.work for i in self.intervals if i.columns is not None)

    def job(self, price: float) -> Interval | None:
        """What to work on, None if nothing is worth while."""
        worth = self.proven() + price * self.lows()
        tied = [self.intervals[i] for i in np.flatnonzero(worth <= worth.min() * (1 + _TIED))]
        for interval in tied:
            if interval.columns is None or not interval.columns.done:
                return interval
        for interval in tied if price > 0 else []:
            lost = price * (interval.high - interval.low)
            if lost > _NARROW * max(self.cheap, interval.proven):
                return interval
        return None

    def run(self, interval: Interval, stop: NDArray[np.int64]) -> None:
        """A step of its columns, or a cut."""
        if interval.columns is None:
            near = min(
                (i for i in self.intervals if i.columns is not None),
                key=lambda i: abs(i.high - interval.high) if i.high < np.inf else np.inf,
                default=None,
            )
            start = self.start if near is None or near.columns is None else near.columns
            interval.columns = start.limited(interval.high)
            interval.columns.add(self.start.members, self.start.rank)
        if not interval.columns.done:
            interval.columns.step(stop)
        elif interval.high == np.inf:
            width = max(_FIRST_WIDTH, interval.low - self.lowest)
            self.cut(interval, interval.low + width)
        else:
            self.cut(interval, (interval.low + interval.high) / 2)

    def cut(self, interval: Interval, at: float) -> None:
        self.intervals.insert(self.intervals.index(interval), Interval(interval.low, at))
        interval.low = at


def priced(layers: Sequence[Levels], cap: float, num_layers: int) -> tuple[float, float]:
    """The price of a layer's imbalance, in tokens, that proves most, and the traffic it proves.

    Args:
        layers: those with tokens.
        cap: on the mean over layers of imbalance; infinite: none.
        num_layers: all; one without tokens has no traffic, and an imbalance of 1.
    """
    if cap == np.inf:
        return 0.0, float(sum(level.proven().min() for level in layers))
    curves = [(level.proven(), level.lows()) for level in layers]
    allowed = cap * num_layers - (num_layers - len(curves))

    def at(price: float) -> tuple[float, float]:
        """The bound, and by how much its layers exceed the cap in all."""
        total, rounding, above = 0.0, 0.0, -allowed
        for traffic, low in curves:
            worth = traffic + price * low
            best = int(worth.argmin())
            total += float(worth[best])
            rounding += abs(float(worth[best]))
            above += float(low[best])
        return total - price * allowed - _ROUNDING * (rounding + price * allowed), above

    best, low, high = (at(0.0)[0], 0.0), 0.0, 1.0
    for _ in range(_DOUBLINGS):
        if at(high)[1] <= 0:
            break
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        value, above = at(middle)
        best = max(best, (value, middle))
        low, high = (middle, high) if above > 0 else (low, middle)
    return best[1], best[0]

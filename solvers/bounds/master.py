"""The relaxed set partition over the sets that are known so far, with prices kept in a box.

    minimise  sum of cost x  +  sum over experts of (centre + box) above + (box - centre) below
    (1)  sum over sets with expert i of x + above_i - below_i = 1
    (2)  sum over sets of a kind of rank of x + missing = ranks of that kind
    x, above, below, missing >= 0

The multipliers of (1) stay within box of centre; `missing` is dear and lets the first sets be few.
Solved by GLOP's simplex method, which goes on from the last basis when sets are added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Master:
    """A linear program that grows."""

    def __init__(self, num_experts: int, kinds: int, each: int, dear: float) -> None:
        """
        Args:
            num_experts: E.
            kinds: of ranks; each: ranks of a kind.
            dear: cost of a rank without a set.
        """
        from ortools.linear_solver import pywraplp

        self.program: Any = pywraplp.Solver.CreateSolver("GLOP")
        self.cost: Any = self.program.Objective()
        self.cost.SetMinimization()
        self.experts = [self.program.Constraint(1.0, 1.0) for _ in range(num_experts)]
        self.kinds = [self.program.Constraint(float(each), float(each)) for _ in range(kinds)]
        self.above = [self._variable([row], 1.0) for row in self.experts]
        self.below = [self._variable([row], -1.0) for row in self.experts]
        self.missing = [self._variable([row], 1.0) for row in self.kinds]
        for variable in self.missing:
            self.cost.SetCoefficient(variable, dear)
        self.num_sets = 0

    def _variable(self, rows: list[Any], coefficient: float) -> Any:
        variable = self.program.NumVar(0.0, self.program.infinity(), "")
        for row in rows:
            row.SetCoefficient(variable, coefficient)
        return variable

    def add(self, members: Integers, kind: Integers, cost: Floats) -> None:
        """Sets [M, s] of experts for a kind [M] of rank at a cost [M]."""
        for experts, of, price in zip(members.tolist(), kind.tolist(), cost.tolist(), strict=True):
            rows = [*(self.experts[expert] for expert in experts), self.kinds[of]]
            self.cost.SetCoefficient(self._variable(rows, 1.0), price)
        self.num_sets += len(cost)

    def solve(self, centre: Floats, box: Floats) -> tuple[float, Floats, Floats, bool] | None:
        """Value, multipliers of (1) and (2), and whether the box is not felt.

        None where the solver has numerical trouble.
        """
        for expert, (at, width) in enumerate(zip(centre.tolist(), box.tolist(), strict=True)):
            self.cost.SetCoefficient(self.above[expert], width + at)
            self.cost.SetCoefficient(self.below[expert], width - at)
        if self.program.Solve() != self.program.OPTIMAL:
            return None
        slack = sum(v.solution_value() for v in (*self.above, *self.below, *self.missing))
        price = np.array([row.dual_value() for row in self.experts])
        rank_price = np.array([row.dual_value() for row in self.kinds])
        return float(self.cost.Value()), price, rank_price, slack <= 1e-9

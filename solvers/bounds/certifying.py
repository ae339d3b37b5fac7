"""Prove bounds on a placement's figures, within a time budget.

Each figure has one or more provers, cheap ones first. A prover is

    (problem, parts, budget) -> Bound | None

`parts` are the figures of `solvers.check.check`. It stops when the budget does and returns the best
that it has proven, or None where it has nothing to say (arrays that are missing, constraints under
which its proof does not hold). Of several bounds on one figure the highest is kept.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from solvers import check
from solvers.bounds.bound import Bound
from solvers.budget import Budget
from solvers.problem import Problem
from solvers.solving import capped_imbalance, ctrl_c_stops

_MET = 1e-9  # a gap that is rounding

Prover = Callable[[Problem, dict[str, float], Budget], Bound | None]

_PROVERS: dict[str, list[Prover]] = {}


def prover(figure: str) -> Callable[[Prover], Prover]:
    """Decorator: a function that proves bounds on the figure of that name."""

    def decorate(function: Prover) -> Prover:
        _PROVERS.setdefault(figure, []).append(function)
        return function

    return decorate


def _load_all() -> None:
    from solvers import bounds

    for module in pkgutil.iter_modules(bounds.__path__, "solvers.bounds."):
        importlib.import_module(module.name)


def known_figures() -> list[str]:
    """Figures that have a prover, sorted."""
    _load_all()
    return sorted(_PROVERS)


def certify(
    problem: Problem,
    placement: NDArray[np.integer],
    budget: Budget,
    figures: Sequence[str] | None = None,
    as_balanced: bool = False,
) -> list[Bound]:
    """Bounds on the figures of a placement, of those that anything can be proven about.

    The first Ctrl-C asks the provers for what they have, as it does a solver.

    Args:
        problem: what was to be placed; the bounds hold on its arrays, for every placement.
        placement: [L, S] logical expert of each slot, -1 = empty.
        budget: time, shared evenly by the provers that are left, and the effort of each.
        figures: which ones; None = all.
        as_balanced: the placements that span and messages are bounded of are no less balanced than
            this one, instead of keeping the problem's cap.

    Raises:
        ValueError: the placement is unsound.
        AssertionError: a bound is above the value, which is an error of the proof.
    """
    _load_all()
    parts = check.check(problem, placement)
    if as_balanced:
        problem = replace(problem, max_imbalance=max(1.0, capped_imbalance(parts)))
    wanted = list(_PROVERS) if figures is None else [name for name in figures if name in _PROVERS]
    jobs = [(figure, function) for figure in wanted for function in _PROVERS[figure]]
    best: dict[str, Bound] = {}
    with ctrl_c_stops(budget):
        for number, (figure, function) in enumerate(jobs):
            if figure in best and best[figure].gap <= _MET:
                continue
            found = function(problem, parts, budget.part(1 / (len(jobs) - number)))
            if found is None:
                continue
            slack = 1e-9 * max(1.0, abs(found.value))
            assert found.lower_bound <= found.value + slack, (
                f"internal error: {found.method} proved {figure} >= {found.lower_bound}, "
                f"but this placement has {found.value}"
            )
            if figure not in best or found.lower_bound > best[figure].lower_bound:
                best[figure] = found
    return list(best.values())

"""The solvers by name. A solver registers itself; adding one touches no other file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from solvers.budget import Budget
from solvers.problem import Problem
from solvers.result import Solution

SolverFunction = Callable[[Problem, int, Budget], Solution]


@dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        name: what `--solver` takes.
        function: (problem, seed, budget) -> Solution.
        summary: first line of its docstring.
        source: where the method was published, or "placer".
        needs: the arrays of `Problem` that it cannot do without, beside `load`.
        replicates: whether it fills redundant slots with replicas.
        deterministic: same seed, same placement, whatever the machine's speed, as long as no time
            limit cuts it short.
    """

    name: str
    function: SolverFunction
    summary: str
    source: str
    needs: tuple[str, ...] = ()
    replicates: bool = False
    deterministic: bool = True


_SOLVERS: dict[str, Solver] = {}


def register(
    name: str,
    *,
    source: str,
    needs: tuple[str, ...] = (),
    replicates: bool = False,
    deterministic: bool = True,
) -> Callable[[SolverFunction], SolverFunction]:
    """Decorator: make a function `(problem, seed, budget) -> Solution` known under `name`."""

    def decorate(function: SolverFunction) -> SolverFunction:
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _SOLVERS[name] = Solver(name, function, summary, source, needs, replicates, deterministic)
        return function

    return decorate


def _load_all() -> None:
    import solvers

    for module in pkgutil.walk_packages(solvers.__path__, "solvers."):
        importlib.import_module(module.name)


def names() -> list[str]:
    """Names of all solvers, sorted."""
    _load_all()
    return sorted(_SOLVERS)


def get(name: str) -> Solver:
    """The solver called `name`; ValueError with the known names otherwise."""
    _load_all()
    if name not in _SOLVERS:
        raise ValueError(f"no solver is called {name!r}; there are {', '.join(sorted(_SOLVERS))}")
    return _SOLVERS[name]

"""The solvers by name. A solver registers itself; adding one touches no other file.

A solver with an integer program says which back ends can solve it; `exflow:scip` is `exflow` with
SCIP, and `exflow` alone is with the first of its back ends.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace

from solvers.result import RequestError, Solution

SolverFunction = Callable[..., Solution]
"""(problem, seed, budget), and where there are back ends, backend."""


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
        restricted: whether it keeps `Problem.restrictions`.
        backends: what can solve its integer program, the default first.
    """

    name: str
    function: SolverFunction
    summary: str
    source: str
    needs: tuple[str, ...] = ()
    replicates: bool = False
    deterministic: bool = True
    restricted: bool = False
    backends: tuple[str, ...] = ()


_SOLVERS: dict[str, Solver] = {}


def register(
    name: str,
    *,
    source: str,
    needs: tuple[str, ...] = (),
    replicates: bool = False,
    deterministic: bool = True,
    restricted: bool = False,
    backends: tuple[str, ...] = (),
) -> Callable[[SolverFunction], SolverFunction]:
    """Decorator: make a function `(problem, seed, budget) -> Solution` known under `name`.

    With back ends the function takes one of them as `backend` too.
    """

    def decorate(function: SolverFunction) -> SolverFunction:
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _SOLVERS[name] = Solver(
            name, function, summary, source, needs, replicates, deterministic, restricted, backends
        )
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
    """The solver called `name`, or `name:backend`; RequestError with what there is otherwise.

    Only the default back end may be deterministic.
    """
    _load_all()
    base, _, backend = name.partition(":")
    if base not in _SOLVERS:
        close = difflib.get_close_matches(base, _SOLVERS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        known = ", ".join(sorted(_SOLVERS))
        raise RequestError(f"no solver is called {base!r}; {meant}there are {known}")
    solver = _SOLVERS[base]
    if base == name:
        return solver
    if backend not in solver.backends:
        known = ", ".join(f"{base}:{other}" for other in solver.backends) or f"{base} alone"
        raise RequestError(f"solver {base!r} has no back end {backend!r}; there are {known}")
    return replace(
        solver,
        name=name,
        function=functools.partial(solver.function, backend=backend),
        deterministic=solver.deterministic and backend == solver.backends[0],
    )

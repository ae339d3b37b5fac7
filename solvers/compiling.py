"""How loops are compiled: one decorator for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import event

from solvers.clock import COMPILE_CLOCK


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba, without the GIL; machine code is kept on disk where that is allowed."""
    return _compiled(function)


def compiled_lean(function: Callable[..., Any]) -> Any:
    """Likewise, a kernel that makes no arrays.

    It may look at parts of those that it is given: their references are not counted then, which in
    short loops over many rows takes a third of the time.
    """
    return _compiled(function, _nrt=False, forceinline=True)


def compiled_for(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Likewise, at once and for one signature only."""
    return lambda function: _compiled(function, signature)


def _compiled(function: Callable[..., Any], signature: Any = None, **options: Any) -> Any:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no writable folder for the cache
        COMPILE_CLOCK.kept = False
        return numba.njit(signature, **options)(function)


class _ToTheClock(event.Listener):  # type: ignore[misc]
    """Says when numba compiles; loading machine code from disk is no compiling."""

    def on_start(self, event: Any) -> None:
        COMPILE_CLOCK.begin()

    def on_end(self, event: Any) -> None:
        COMPILE_CLOCK.end()


event.register("numba:compile", _ToTheClock())

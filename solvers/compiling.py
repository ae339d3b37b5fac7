"""How loops are compiled: one decorator for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba, without the GIL; machine code is kept on disk where that is allowed."""
    return _compiled(function)


def compiled_lean(function: Callable[..., Any]) -> Any:
    """Likewise, a kernel that makes no arrays.

    It may look at parts of those that it is given: their references are not counted then, which in
    short loops over many rows takes a third of the time.
    """
    return _compiled(function, _nrt=False, forceinline=True)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable folder for the cache
        return numba.njit(**options)(function)

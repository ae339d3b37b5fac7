"""How loops are compiled: one decorator for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba, without the GIL; machine code is kept on disk where that is allowed."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable folder for the cache
        return numba.njit(**options)(function)

"""Threads for kernels that release the interpreter lock, and how they are stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.clock import COMPILE_CLOCK

POLL_S = 0.05


@contextmanager
def stopping(stop: NDArray[np.int64], budget: Budget) -> Iterator[None]:
    """While this is entered, `stop` [1] turns 1 when the budget ends.

    It is not asked while a kernel is compiled, when no time passes and nothing can stop: a budget
    of a number of questions (`solvers.rehearsing`) would be used up by them.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            if not COMPILE_CLOCK.running and budget.expired():
                stop[0] = 1

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

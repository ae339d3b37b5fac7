"""Time that passes, what compiling takes of it kept apart.

Kernels are compiled in the first run on a machine: seconds up to half a minute, which are no time
of a search's or a proof's. `solvers.compiling` reports to the one `CompileClock` of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Watcher = Callable[[bool], None]


class CompileClock:
    """Runs while kernels are compiled; one thread at a time does, and kernels may nest.

    Attributes:
        kept: whether machine code is kept on disk, so that the next process needs not compile.
    """

    def __init__(self) -> None:
        self.kept = True
        self._lock = threading.Lock()
        self._depth, self._began, self._total = 0, 0.0, 0.0
        self._watchers: list[Watcher] = []

    def begin(self) -> None:
        """A kernel is being compiled."""
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            self._began = time.monotonic()
        self._tell(True)

    def end(self) -> None:
        """It is no longer."""
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            self._total += time.monotonic() - self._began
        self._tell(False)

    @property
    def running(self) -> bool:
        """Whether a kernel is being compiled."""
        return self._depth > 0

    def seconds(self) -> float:
        """Of wall-clock time, in which this process has compiled so far."""
        with self._lock:
            return self._passed(time.monotonic())

    def working_s(self) -> float:
        """A clock that stands still while a kernel is compiled."""
        with self._lock:
            now = time.monotonic()
            return now - self._passed(now)

    def _passed(self, now: float) -> float:
        return self._total + (now - self._began if self._depth else 0.0)

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """While this is entered, tell `watcher` when compiling begins (True) and ends (False).

        It is called by the thread that compiles.
        """
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def _tell(self, compiling: bool) -> None:
        for watcher in tuple(self._watchers):
            watcher(compiling)


COMPILE_CLOCK = CompileClock()


def working_s() -> float:
    """Wall-clock seconds since some moment, without those in which kernels were compiled."""
    return COMPILE_CLOCK.working_s()

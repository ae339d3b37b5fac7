"""`Budget`: when a solver must stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from solvers.clock import working_s
from solvers.result import Termination


@dataclass
class Budget:
    """A wall-clock limit and a flag that Ctrl-C or another thread may set.

    A solver asks `expired()` between pieces of work of at most some 0.1 s and, once it says true,
    returns the best placement that it has. The clock stands still while kernels are compiled.

    Attributes:
        seconds: wall-clock limit from the moment of construction; None = none.
        effort: limit on the work of each proof in nominal seconds, which end it at the same step on
            every machine; None = none.
    """

    seconds: float | None = None
    effort: float | None = None
    _start: float = field(default_factory=working_s)
    _stop: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Ask the solver to finish."""
        self._stop.set()

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    def remaining(self) -> float:
        """Seconds left; infinity without a limit."""
        if self.seconds is None:
            return float("inf")
        return max(0.0, self.seconds - self.elapsed())

    def elapsed(self) -> float:
        """Seconds since construction, compiling aside."""
        return working_s() - self._start

    def part(self, share: float) -> Budget:
        """A budget of a share of the remaining time; stopping one stops the other."""
        return self.other(None if self.seconds is None else share * self.remaining(), self.effort)

    def other(self, seconds: float | None, effort: float | None = None) -> Budget:
        """Another budget that begins now; stopping one stops the other."""
        return type(self)(seconds, effort, _stop=self._stop)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this is entered, no time of the limit passes."""
        start = self.elapsed()
        try:
            yield
        finally:
            self._start += self.elapsed() - start

    def expired(self) -> bool:
        return self._stop.is_set() or self.remaining() <= 0.0

    def termination(self) -> Termination:
        """Why a solver that ends now ends."""
        if self.interrupted:
            return "interrupted"
        return "time_limit" if self.remaining() <= 0.0 else "finished"

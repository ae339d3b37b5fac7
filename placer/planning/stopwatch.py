"""How long making a plan takes, what compiling takes of it apart."""

from __future__ import annotations

import time

from solvers.clock import COMPILE_CLOCK

TOLD_S = 1.0  # of compiling; less is not worth a word


class Stopwatch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._start, self._compiled = time.perf_counter(), COMPILE_CLOCK.seconds()

    def total_s(self) -> float:
        """Wall-clock seconds, compiling among them."""
        return time.perf_counter() - self._start

    def compiling(self) -> dict[str, float]:
        """Seconds of compiling under `compile_s`; nothing where they were few."""
        seconds = COMPILE_CLOCK.seconds() - self._compiled
        return {"compile_s": round(seconds, 3)} if seconds >= TOLD_S else {}

    def timings(self) -> dict[str, float]:
        """Of a plan: `compile_s`, if it is worth a word, and `total_s`."""
        return {**self.compiling(), "total_s": round(self.total_s(), 3)}

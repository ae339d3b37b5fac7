"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class LoadMemory:
    """What loading a rank's share took.

    Attributes:
        share_bytes: what the plan gives the rank: non-expert weights plus its experts.
        tensor_bytes: bytes of the tensors that the rank holds, each storage counted once.
        peak_rss_bytes: the most resident memory while loading, above what the process had before,
            the program's code and the model's modules without weights (measured); None where the
            system does not say.
    """

    share_bytes: int
    tensor_bytes: int
    peak_rss_bytes: int | None


def resident_bytes() -> int | None:
    """Resident memory of this process now, or None where /proc does not say."""
    return _status("VmRSS")


class PeakMemory:
    """The most resident memory since it was made, above what there was then.

    Free memory is given back first: what is taken from then on counts, wherever it comes from.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # of the C library of GNU
            ctypes.CDLL(None).malloc_trim(0)
        self._start = resident_bytes()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
        except OSError:
            self._start = None

    def above_start(self) -> int | None:
        peak = _status("VmHWM")
        return None if peak is None or self._start is None else max(0, peak - self._start)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def available_bytes() -> int | None:
    """Memory that this machine could still give, or None where it does not say."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    return int(found.split()[1]) * 1024 if found else None

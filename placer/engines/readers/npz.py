"""The interchange trace."""

from __future__ import annotations

from pathlib import Path

from placer.engines.records import Hints, Recorded
from placer.trace.npz import load_npz


def read(path: Path, hints: Hints) -> Recorded:
    """Read an interchange trace; it says everything itself."""
    trace, unknown = load_npz(path)
    warnings = [f"keys that placer does not know: {', '.join(unknown)}"] if unknown else []
    return Recorded(trace, warnings)

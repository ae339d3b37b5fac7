"""What is in a trace, and is it sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from placer.trace.source import open_trace


def inspect_trace(path: Path) -> dict[str, Any]:
    source = open_trace(path)
    return {"tokens": source.num_tokens}

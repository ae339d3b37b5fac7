"""Traces: which experts each token took, on disk and in memory (docs/traces.md).

What needs pyarrow is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from placer.trace.checks import make_trace
from placer.trace.memory import MemorySource
from placer.trace.model import DECODE, PHASE_NAMES, PREFILL, ModelDims, Trace
from placer.trace.npz import read_npz, write_npz
from placer.trace.opening import may_be_trace, open_trace
from placer.trace.source import TraceSource
from placer.trace.split import Split, split_requests

if TYPE_CHECKING:
    from placer.trace.importing import ImportSummary, import_npz, new_trace_folder, write_trace
    from placer.trace.inspecting import inspect_trace
    from placer.trace.store import TraceWriter

__all__ = [
    "DECODE",
    "PHASE_NAMES",
    "PREFILL",
    "ImportSummary",
    "MemorySource",
    "ModelDims",
    "Split",
    "Trace",
    "TraceSource",
    "TraceWriter",
    "import_npz",
    "inspect_trace",
    "make_trace",
    "may_be_trace",
    "new_trace_folder",
    "open_trace",
    "read_npz",
    "split_requests",
    "write_npz",
    "write_trace",
]

_LATE = {
    "ImportSummary": "importing",
    "TraceWriter": "store",
    "import_npz": "importing",
    "inspect_trace": "inspecting",
    "new_trace_folder": "importing",
    "write_trace": "importing",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"placer.trace.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""placer: expert placement and scheduling for Mixture-of-Experts inference.

    with placer.capture(model) as tracer:
        model.generate(**inputs)
    trace = tracer.trace()

Everything named here is loaded on first use: importing placer costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.plan import Plan, read_plan, write_plan
    from placer.trace import Trace, make_trace, open_trace
    from placer.tracer import capture

__version__ = "0.1.0"

__all__ = [
    "Placement",
    "Plan",
    "Trace",
    "capture",
    "make_trace",
    "open_trace",
    "read_plan",
    "write_plan",
]

_LATE = {
    "Placement": "placement",
    "Plan": "plan",
    "Trace": "trace",
    "capture": "tracer",
    "make_trace": "trace",
    "open_trace": "trace",
    "read_plan": "plan",
    "write_plan": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"placer.{_LATE[name]}"), name)

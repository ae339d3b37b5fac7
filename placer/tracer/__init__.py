"""Tracing: capture which experts a running model routes each token to (docs/tracing.md).

torch and transformers are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from placer.errors import MissingExtraError

if TYPE_CHECKING:
    from placer.tracer.prompts import Prompt, read_prompts
    from placer.tracer.run import TraceSummary, trace_model
    from placer.tracer.tracer import Tracer, capture

__all__ = [
    "Prompt",
    "TraceSummary",
    "Tracer",
    "capture",
    "read_prompts",
    "trace_model",
]

_LATE = {
    "Prompt": "prompts",
    "TraceSummary": "run",
    "Tracer": "tracer",
    "capture": "tracer",
    "read_prompts": "prompts",
    "trace_model": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"placer.tracer.{_LATE[name]}")
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            raise MissingExtraError(error.name, "trace") from None
        raise
    return getattr(module, name)

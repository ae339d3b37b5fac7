"""The plugin that vLLM loads in each of its processes (`vllm.general_plugins`).

It does nothing, and imports nothing but the standard library, unless PLACER_TRACE_DIR is set, or
PLACER_VLLM_PLAN (`placer.engines.vllm.placing`):

    PLACER_TRACE_DIR       folder of the native trace; it must not hold a trace yet
    PLACER_TRACE_TOKENS    stop after this many tokens (of each data-parallel rank)
    PLACER_TRACE_WEIGHTS   1 keeps the gate weights

Written against vLLM 0.32 (`vllm/v1/worker/worker_base.py: WorkerWrapperBase`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placer.errors import UsageError

_MARK = "_placer_traces"


@dataclass(frozen=True)
class TraceSettings:
    """What the environment asks for.

    Attributes:
        folder: of the native trace.
        max_tokens: stop after so many; None = never.
        weights: whether gate weights are kept.
    """

    folder: Path
    max_tokens: int | None = None
    weights: bool = False


def settings_from(environment: Mapping[str, str]) -> TraceSettings | None:
    """The settings, or None when no trace is asked for.

    Raises:
        UsageError: a variable makes no sense.
    """
    folder = environment.get("PLACER_TRACE_DIR", "")
    if not folder:
        return None
    tokens = environment.get("PLACER_TRACE_TOKENS", "")
    if tokens and (not tokens.isdecimal() or int(tokens) == 0):
        raise UsageError(f"PLACER_TRACE_TOKENS is {tokens!r}, expected a number of tokens")
    weights = environment.get("PLACER_TRACE_WEIGHTS", "0")
    if weights not in ("0", "1"):
        raise UsageError(f"PLACER_TRACE_WEIGHTS is {weights!r}, expected 0 or 1")
    return TraceSettings(Path(folder), int(tokens) if tokens else None, weights == "1")


def register() -> None:
    """Called by vLLM, perhaps several times in a process."""
    _trace_if_asked()
    if os.environ.get("PLACER_VLLM_PLAN"):
        from placer.engines.vllm.placing import place_experts

        place_experts(os.environ)


def _trace_if_asked() -> None:
    settings = settings_from(os.environ)
    if settings is None:
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, _MARK):
        return
    setattr(WorkerWrapperBase, _MARK, True)
    _trace_workers(WorkerWrapperBase, settings)


def _trace_workers(wrapper_class: Any, settings: TraceSettings) -> None:
    """Attach a recorder to every worker once its model is loaded; end it with the worker."""
    plain_shutdown = wrapper_class.shutdown

    def load_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        from placer.engines.vllm.recorder import attach

        # graphs that were compiled without the recorder may not be taken from the cache
        extra = wrapper.vllm_config.additional_config
        if isinstance(extra, dict):
            extra["placer_trace"] = True
        result = wrapper.worker.load_model(*args, **kwargs)
        wrapper.placer_recorder = attach(wrapper.worker, wrapper.vllm_config, settings)
        return result

    def shutdown(wrapper: Any) -> None:
        recorder = wrapper.__dict__.get("placer_recorder")
        if recorder is not None:
            recorder.close()
        plain_shutdown(wrapper)

    wrapper_class.load_model = load_model
    wrapper_class.shutdown = shutdown

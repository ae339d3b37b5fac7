"""`MemorySource`: a trace that is in memory already."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.trace.model import Trace
from placer.trace.source import ARRAYS, CHUNK_TOKENS, TraceSource, check_max_tokens


class MemorySource(TraceSource):
    """A trace in memory."""

    def __init__(self, trace: Trace, *, path: Path | None = None) -> None:
        self.path = path
        self.trace = trace
        self.num_experts = trace.num_experts
        self.layer_ids = trace.layer_ids
        self.top_k = trace.top_k
        self.num_tokens = trace.num_tokens
        self.model = trace.model
        self.has_weights = trace.weights is not None
        self.has_step = trace.step is not None
        self.has_home = trace.home is not None
        self.complete = True
        self.warnings = []

    def chunks(
        self, max_tokens: int = CHUNK_TOKENS, *, with_weights: bool = True
    ) -> Iterator[Trace]:
        check_max_tokens(max_tokens)
        for start in range(0, self.num_tokens, max_tokens):
            here = slice(start, start + max_tokens)
            changed: dict[str, Any] = {
                name: None if (values := getattr(self.trace, name)) is None else values[here]
                for name in ARRAYS
                if with_weights or name != "weights"
            }
            labels = {}
            if self.trace.labels:
                for request in np.unique(self.trace.request[here]).tolist():
                    if request in self.trace.labels:
                        labels[request] = self.trace.labels[request]
            yield replace(self.trace, **{"weights": None, **changed, "labels": labels})

    def token_columns(self, names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
        yield {name: getattr(self.trace, name) for name in names}

    def request_labels(self) -> dict[int, str]:
        present = set(self.trace.requests().tolist())
        return {
            request: label for request, label in self.trace.labels.items() if request in present
        }

"""Several traces of one model as one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.trace.model import Trace
from placer.trace.source import CHUNK_TOKENS, TraceSource


class ConcatenatedSource(TraceSource):
    """Sources one after the other; made by `concatenate`.

    Requests of the second and later sources get ids of their own. Forward-pass numbers are shifted
    as well, so that a batch never joins two traces. Columns that some source lacks are
    dropped; without gate weights the primary expert moves to column 0.
    """

    def __init__(self, sources: Sequence[TraceSource]) -> None:
        first = sources[0]
        for other in sources[1:]:
            same = other.num_experts == first.num_experts
            if not same or not np.array_equal(other.layer_ids, first.layer_ids):
                raise UsageError(
                    f"{other.name} has {_shape(other)}, {first.name} {_shape(first)}",
                    "traces of one plan must come from one model",
                )
        self._sources = list(sources)
        self.path = None
        self.num_experts = first.num_experts
        self.layer_ids = first.layer_ids
        self.top_k = max(source.top_k for source in sources)
        self.num_tokens = sum(source.num_tokens for source in sources)
        self.model = first.model
        self.has_weights = all(source.has_weights for source in sources)
        self.has_step = all(source.has_step for source in sources)
        self.has_home = all(source.has_home for source in sources)
        self.complete = all(source.complete for source in sources)
        self.warnings = [warning for source in sources for warning in source.warnings]
        self._request_shift = self._shifts("request")
        self._step_shift = self._shifts("step") if self.has_step else [0] * len(sources)

    def part_names(self) -> tuple[str, ...]:
        """The name of each source."""
        return tuple(source.name for source in self._sources)

    def part_of(self, requests: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R] which source each request comes from."""
        found: NDArray[np.int64] = np.searchsorted(self._request_shift, requests, side="right") - 1
        return found

    def _shifts(self, column: str) -> list[int]:
        shifts, shift = [], 0
        for source in self._sources:
            shifts.append(shift)
            last = max(int(part[column].max()) for part in source.token_columns([column]))
            shift += last + 1
        return shifts

    def chunks(
        self, max_tokens: int = CHUNK_TOKENS, *, with_weights: bool = True
    ) -> Iterator[Trace]:
        weights = with_weights and self.has_weights
        for number, source in enumerate(self._sources):
            request_shift, step_shift = self._request_shift[number], self._step_shift[number]
            dropped = source.has_weights and not self.has_weights
            for chunk in source.chunks(max_tokens, with_weights=weights or dropped):
                if dropped:
                    chunk = _primary_first(chunk)
                missing = self.top_k - chunk.top_k
                padding = ((0, 0), (0, 0), (0, missing))
                yield replace(
                    chunk,
                    experts=np.pad(chunk.experts, padding, constant_values=-1)
                    if missing
                    else chunk.experts,
                    weights=np.pad(chunk.weights, padding) if chunk.weights is not None else None,
                    request=chunk.request + request_shift,
                    step=chunk.step + step_shift
                    if self.has_step and chunk.step is not None
                    else None,
                    home=chunk.home if self.has_home else None,
                    labels={i + request_shift: label for i, label in chunk.labels.items()},
                )

    def token_columns(self, names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
        for number, source in enumerate(self._sources):
            for part in source.token_columns(names):
                if "request" in part:
                    part = {**part, "request": part["request"] + self._request_shift[number]}
                if "step" in part:
                    part = {**part, "step": part["step"] + self._step_shift[number]}
                yield part

    def request_labels(self) -> dict[int, str]:
        return {
            request + self._request_shift[number]: label
            for number, source in enumerate(self._sources)
            for request, label in source.request_labels().items()
        }


def _primary_first(trace: Trace) -> Trace:
    """The trace without gate weights, its primary experts moved to column 0."""
    if trace.weights is None:
        return trace
    masked = np.where(trace.experts >= 0, trace.weights, -np.inf)
    column = masked.argmax(axis=2)[:, :, None]
    order = np.argsort(np.arange(trace.top_k) != column, axis=2, kind="stable")
    return replace(trace, experts=np.take_along_axis(trace.experts, order, axis=2), weights=None)


def _shape(source: TraceSource) -> str:
    ids = source.layer_ids.tolist()
    return f"{len(ids)} layers (ids {ids[0]}..{ids[-1]}) x {source.num_experts} experts"


def concatenate(sources: Sequence[TraceSource]) -> TraceSource:
    """Sources of one model as one; a single one is given back as it is.

    Raises:
        UsageError: they come from different models.
    """
    return sources[0] if len(sources) == 1 else ConcatenatedSource(sources)

"""`TraceSource`: a trace on disk or in memory, read whole or in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import PlacerError, UsageError
from placer.trace.fingerprint import fingerprint
from placer.trace.labels import add_label
from placer.trace.model import PHASE_NAMES, ModelDims, Trace

CHUNK_TOKENS = 65536
ARRAYS = ("experts", "request", "position", "phase", "step", "weights", "home")


class TraceSource(ABC):
    """Tokens in a fixed order, which can be gone through again and again.

    Attributes:
        path: where the trace lies; None for one in memory.
        num_experts: E.
        layer_ids: [L] int64.
        top_k: the most experts that a token may use in one layer (K).
        num_tokens: T.
        model: dimensions of the model.
        has_weights, has_step, has_home: whether the trace records these.
        complete: False when a rank was cut off while it wrote.
        warnings: what a user should know, a sentence each.
    """

    path: Path | None
    num_experts: int
    layer_ids: NDArray[np.int64]
    top_k: int
    num_tokens: int
    model: ModelDims
    has_weights: bool
    has_step: bool
    has_home: bool
    complete: bool
    warnings: list[str]

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def name(self) -> str:
        """What messages call this trace."""
        return "the trace" if self.path is None else str(self.path)

    def _resemble(self, parent: TraceSource) -> None:
        """Take over what a view of another trace shares with it: all but the tokens."""
        for name in ("path", "num_experts", "layer_ids", "top_k", "model", "has_weights",
                     "has_step", "has_home", "complete", "warnings"):  # fmt: skip
            setattr(self, name, getattr(parent, name))

    @abstractmethod
    def chunks(
        self, max_tokens: int = CHUNK_TOKENS, *, with_weights: bool = True
    ) -> Iterator[Trace]:
        """The tokens in order, at most `max_tokens` at a time, in bounded memory.

        A chunk's labels are those of requests that have tokens in the chunk. Chunks may be
        smaller than `max_tokens`, never empty.
        """

    @abstractmethod
    def token_columns(self, names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
        """Stream some of `request`, `position`, `phase`, `step`, `home`, without the experts."""

    @abstractmethod
    def request_labels(self) -> dict[int, str]:
        """Request id -> label, of the requests that have one."""

    def read(self, *, with_weights: bool = True) -> Trace:
        """All tokens in memory."""
        arrays: dict[str, Any] = {}
        labels: dict[int, str] = {}
        at = 0
        chunk: Trace | None = None
        for chunk in self.chunks(with_weights=with_weights):
            count = chunk.num_tokens
            for name in ARRAYS:
                values = getattr(chunk, name)
                if values is None:
                    continue
                if name not in arrays:
                    arrays[name] = np.empty((self.num_tokens, *values.shape[1:]), values.dtype)
                arrays[name][at : at + count] = values
            for request, label in chunk.labels.items():
                add_label(labels, request, label, self.name)
            at += count
        assert chunk is not None
        assert at == self.num_tokens
        return replace(chunk, labels=labels, **arrays)

    def request_ids(self) -> NDArray[np.int64]:
        """The distinct request ids, increasing."""
        return self.requests()

    def requests(
        self, *, phase: str | int | None = None, labels: Iterable[str] | None = None
    ) -> NDArray[np.int64]:
        """The distinct ids, increasing, of requests with tokens of `phase` and one of `labels`."""
        wanted = None if phase is None else phase_number(phase)
        ids = np.empty(0, np.int64)
        for part in self.token_columns(["request", "phase"] if phase is not None else ["request"]):
            found = part["request"] if wanted is None else part["request"][part["phase"] == wanted]
            ids = np.union1d(ids, found)
        if labels is None:
            return ids
        chosen, by_request = set(labels), self.request_labels()
        return np.array([i for i in ids.tolist() if by_request.get(i) in chosen], np.int64)

    def filtered(
        self,
        *,
        phase: str | int | None = None,
        requests: Iterable[int] | NDArray[np.integer] | None = None,
        labels: Iterable[str] | str | None = None,
    ) -> TraceSource:
        """The tokens of a phase, of some requests, of requests with some labels.

        Args:
            phase: "prefill" or 0, "decode" or 1.
            requests: request ids.
            labels: one label or several.

        Raises:
            PlacerError: no token is left, or a label does not occur.
        """
        if phase is None and requests is None and labels is None:
            return self
        wanted = None if phase is None else phase_number(phase)
        keep = None
        if requests is not None:
            keep = np.unique(
                np.asarray(requests if isinstance(requests, np.ndarray) else list(requests))
            )
        if labels is not None:
            names = {labels} if isinstance(labels, str) else set(labels)
            by_request = self.request_labels()
            unknown = sorted(names - set(by_request.values()))
            if unknown:
                raise PlacerError(
                    f"no request of {self.name} has the label {unknown[0]!r}",
                    f"labels: {listing(by_request.values())}",
                )
            labelled = np.array([i for i, name in by_request.items() if name in names], np.int64)
            keep = np.sort(labelled) if keep is None else np.intersect1d(keep, labelled)
        from placer.trace.filtering import FilteredSource

        return FilteredSource(self, phase=wanted, requests=keep)

    def fingerprint(self) -> str:
        """Hex digest of the content; see `placer.trace.fingerprint`."""
        return fingerprint(self)


def phase_number(phase: str | int) -> int:
    """0 for prefill, 1 for decode, from the name or the number."""
    if phase in PHASE_NAMES:
        return PHASE_NAMES.index(phase)
    if isinstance(phase, int) and phase in range(len(PHASE_NAMES)):
        return phase
    raise UsageError(f"there is no phase {phase!r}", f"phases: {', '.join(PHASE_NAMES)}")


def check_max_tokens(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, expected 1 or more")


def listing(values: Iterable[Any], most: int = 12) -> str:
    """Distinct values, sorted, a long list cut short."""
    distinct = sorted(set(values))
    if not distinct:
        return "none"
    shown = ", ".join(str(value) for value in distinct[:most])
    return shown if len(distinct) <= most else f"{shown}, ... ({len(distinct)} in all)"

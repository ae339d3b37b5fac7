"""`TraceSource`: a trace on disk or in memory, read whole or in chunks.

`open_trace` picks the kind; `filtered` narrows one to a phase, to requests or to labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import BadFileError, PlacerError, UsageError
from placer.trace.fingerprint import fingerprint
from placer.trace.labels import add_label
from placer.trace.model import PHASE_NAMES, ModelDims, Trace
from placer.trace.npz import load_npz

CHUNK_TOKENS = 65536
_MANIFEST = "manifest.json"


def open_trace(path: Path | str) -> TraceSource:
    """Open a native trace (its folder or its manifest) or an interchange trace (an .npz file).

    Raises:
        BadFileError: missing, damaged, or neither of these.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> TraceSource:
    if path.name == _MANIFEST:
        path = path.parent
    if path.is_dir():
        from placer.trace.native import NativeSource

        return NativeSource(path)
    if not path.exists():
        raise BadFileError(f"{path} does not exist", "expected a trace: a folder or an .npz file")
    if path.suffix == ".parquet":
        raise BadFileError(
            f"{path} may be a part of a trace, but is not a whole one",
            f"give the folder that it lies in: {path.parent}",
        )
    trace, unknown = load_npz(path)
    source = MemorySource(trace, path=path)
    if unknown:
        source.warnings.append(f"keys that placer does not know: {', '.join(unknown)}")
    return source


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
            for name in _ARRAYS:
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
            keep = np.unique(np.asarray(requests if _is_array(requests) else list(requests)))
        if labels is not None:
            names = {labels} if isinstance(labels, str) else set(labels)
            by_request = self.request_labels()
            unknown = sorted(names - set(by_request.values()))
            if unknown:
                raise PlacerError(
                    f"no request of {self.name} has the label {unknown[0]!r}",
                    f"labels: {_listing(by_request.values())}",
                )
            labelled = np.array([i for i, name in by_request.items() if name in names], np.int64)
            keep = np.sort(labelled) if keep is None else np.intersect1d(keep, labelled)
        return FilteredSource(self, phase=wanted, requests=keep)

    def fingerprint(self) -> str:
        """Hex digest of the content; see `placer.trace.fingerprint`."""
        return fingerprint(self)


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
                for name in _ARRAYS
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


class FilteredSource(TraceSource):
    """Some tokens of another source; made by `TraceSource.filtered`."""

    def __init__(
        self, parent: TraceSource, *, phase: int | None, requests: NDArray[np.integer] | None
    ) -> None:
        self.path = parent.path
        self._parent = parent
        self._phase = phase
        self._requests = requests
        self.num_experts = parent.num_experts
        self.layer_ids = parent.layer_ids
        self.top_k = parent.top_k
        self.model = parent.model
        self.has_weights = parent.has_weights
        self.has_step = parent.has_step
        self.has_home = parent.has_home
        self.complete = parent.complete
        self.warnings = parent.warnings
        phases = np.zeros(len(PHASE_NAMES), np.int64)
        self.num_tokens = 0
        for part in parent.token_columns(["request", "phase"]):
            phases += np.bincount(part["phase"], minlength=len(PHASE_NAMES))
            self.num_tokens += int(self._mask(part["request"], part["phase"]).sum())
        if self.num_tokens == 0:
            self._refuse_empty(phases)

    def chunks(
        self, max_tokens: int = CHUNK_TOKENS, *, with_weights: bool = True
    ) -> Iterator[Trace]:
        for chunk in self._parent.chunks(max_tokens, with_weights=with_weights):
            mask = self._mask(chunk.request, chunk.phase)
            if mask.all():
                yield chunk
            elif mask.any():
                kept = chunk.select(mask)
                present = set(kept.requests().tolist()) if chunk.labels else set()
                labels = {i: label for i, label in chunk.labels.items() if i in present}
                yield replace(kept, labels=labels)

    def token_columns(self, names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
        for part in self._parent.token_columns({*names, "request", "phase"}):
            mask = self._mask(part["request"], part["phase"])
            if mask.any():
                yield {name: part[name][mask] for name in names}

    def request_labels(self) -> dict[int, str]:
        present = set(self.request_ids().tolist())
        labels = self._parent.request_labels()
        return {request: label for request, label in labels.items() if request in present}

    def _mask(self, request: NDArray[np.int64], phase: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """[t] whether a token is kept."""
        mask = np.ones(len(request), bool) if self._phase is None else phase == self._phase
        if self._requests is not None:
            mask &= np.isin(request, self._requests)
        return mask

    def _refuse_empty(self, phase_counts: NDArray[np.int64]) -> None:
        counts = ", ".join(
            f"{count} {name}"
            for name, count in zip(PHASE_NAMES, phase_counts.tolist(), strict=True)
            if count
        )
        asked = [] if self._phase is None else [f"of phase {PHASE_NAMES[self._phase]}"]
        if self._requests is not None:
            asked.append(f"of the {self._requests.size} request(s) asked for")
        raise PlacerError(
            f"{self.name} has no tokens {' and '.join(asked)}",
            f"tokens by phase: {counts}; requests: {_listing(self._parent.request_ids().tolist())}",
        )


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


_ARRAYS = ("experts", "request", "position", "phase", "step", "weights", "home")


def _is_array(values: object) -> bool:
    return isinstance(values, np.ndarray)


def _listing(values: Iterable[Any], most: int = 12) -> str:
    """Distinct values, sorted, a long list cut short."""
    distinct = sorted(set(values))
    if not distinct:
        return "none"
    shown = ", ".join(str(value) for value in distinct[:most])
    return shown if len(distinct) <= most else f"{shown}, ... ({len(distinct)} in all)"

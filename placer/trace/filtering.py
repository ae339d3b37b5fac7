"""`FilteredSource`: the tokens of a phase, or of some requests, of another source."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.trace.model import PHASE_NAMES, Trace
from placer.trace.source import CHUNK_TOKENS, TraceSource, listing
from placer.wording import counted


class FilteredSource(TraceSource):
    """Some tokens of another source; made by `TraceSource.filtered`."""

    def __init__(
        self, parent: TraceSource, *, phase: int | None, requests: NDArray[np.integer] | None
    ) -> None:
        self._resemble(parent)
        self._parent = parent
        self._phase = phase
        self._requests = requests
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

    def _refuse_empty(self, phase_counts: NDArray[np.int64]) -> NoReturn:
        counts = ", ".join(
            f"{count} {name}"
            for name, count in zip(PHASE_NAMES, phase_counts.tolist(), strict=True)
            if count
        )
        asked = [] if self._phase is None else [f"of phase {PHASE_NAMES[self._phase]}"]
        if self._requests is not None:
            asked.append(f"of the {counted(self._requests.size, 'request')} asked for")
        raise UsageError(
            f"{self.name} has no tokens {' and '.join(asked)}",
            f"tokens by phase: {counts}; requests: {listing(self._parent.request_ids().tolist())}",
        )

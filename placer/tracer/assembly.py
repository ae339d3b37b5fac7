"""From passes on the host to tokens of a trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.tracer.passes import Pass, Rows
from placer.tracer.sinks import Sink
from placer.tracer.sites import Layout

_FEW_PASSES = 32  # passes that are turned into tokens at once
_FEW_TOKENS = 4096
_MANY_PASSES = 256  # passes that may be on their way before the host waits for the oldest


class Assembly:
    """Turns passes into tokens, in their order, some at a time.

    Args:
        layout: what is traced.
        sink: where tokens go.
        weights: whether gate weights are kept; they order a token's experts in any case, so that
            the primary one comes first.
        labels: request id -> label; may grow while tracing.
    """

    def __init__(
        self, layout: Layout, sink: Sink, *, weights: bool, labels: Mapping[int, str]
    ) -> None:
        self._layout = layout
        self._sink = sink
        self._weights = weights
        self._labels = labels
        self._waiting: deque[Pass] = deque()
        self._num_waiting_tokens = 0
        self._drop_zero = np.array([site.drop_zero for site in layout.sites])
        self.num_tokens = 0

    def add(self, done: Pass) -> None:
        """Take a pass whose copy has been started."""
        self._waiting.append(done)
        self._num_waiting_tokens += done.num_tokens
        if len(self._waiting) >= _FEW_PASSES or self._num_waiting_tokens >= _FEW_TOKENS:
            self._take(wait=len(self._waiting) >= _MANY_PASSES)

    def flush(self) -> None:
        """Turn all passes into tokens."""
        self._take(wait=True)

    def _take(self, *, wait: bool) -> None:
        ready: list[Rows] = []
        while self._waiting and (wait or self._waiting[0].is_copied()):
            oldest = self._waiting.popleft()
            self._num_waiting_tokens -= oldest.num_tokens
            ready.append(oldest.rows(self._layout))
        if ready:
            self._write(Rows(*(_join(parts) for parts in zip(*ready, strict=True))))

    def _write(self, rows: Rows) -> None:
        if len(rows.experts) == 0:
            return
        experts, weights = self._tidy(rows.experts, rows.weights)
        labels = [self._labels.get(r) for r in rows.request.tolist()] if self._labels else None
        self._sink.append(
            experts=experts,
            weights=weights if self._weights else None,
            request=rows.request,
            position=rows.position,
            phase=rows.phase,
            step=rows.step,
            labels=labels,
        )
        self.num_tokens += len(experts)

    def _tidy(
        self, experts: NDArray[Any], weights: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Mark what is unused with -1, and put the experts in the order of their weights."""
        unused = (experts < 0) | (experts >= self._layout.num_experts)
        if weights is not None and self._drop_zero.any():
            unused |= (weights == 0) & self._drop_zero[:, None]
        has_unused = bool(unused.any())
        if has_unused:
            experts = np.where(unused, -1, experts)
        if weights is None:
            return experts, None
        ranked = np.where(unused, -np.inf, weights) if has_unused else weights
        if not (ranked[..., 1:] <= ranked[..., :-1]).all():
            order = np.argsort(-ranked, axis=-1, kind="stable")
            experts = np.take_along_axis(experts, order, axis=-1)
            weights = np.take_along_axis(weights, order, axis=-1)
        return experts, weights


def _join(parts: Sequence[NDArray[Any] | None]) -> Any:
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else None

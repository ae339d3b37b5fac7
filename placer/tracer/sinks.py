"""Where traced tokens go: into memory, or part by part into a native trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from placer.errors import PlacerError
from placer.trace import ModelDims, Trace, make_trace

if TYPE_CHECKING:
    from placer.trace.store import TraceWriter


class MemorySink:
    """Keeps tokens until `trace` is asked for."""

    def __init__(self, *, num_experts: int, layer_ids: Sequence[int], model: ModelDims) -> None:
        self._num_experts = num_experts
        self._layer_ids = np.asarray(layer_ids, np.int64)
        self._model = model
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._labels: dict[int, str] = {}

    def append(
        self,
        *,
        request: NDArray[np.int64],
        labels: Sequence[str | None] | None,
        **columns: NDArray[Any] | None,
    ) -> None:
        for name, values in {"request": request, **columns}.items():
            if values is not None:
                self._columns.setdefault(name, []).append(values)
        if labels is not None:
            pairs = zip(request.tolist(), labels, strict=True)
            self._labels.update({number: label for number, label in pairs if label})

    def trace(self) -> Trace:
        if not self._columns:
            raise PlacerError("nothing was traced", "call the model inside the with block")
        return make_trace(
            **{name: np.concatenate(parts) for name, parts in self._columns.items()},
            num_experts=self._num_experts,
            layer_ids=self._layer_ids,
            labels=self._labels,
            model=self._model,
            where="captured routing",
        )


class FolderSink:
    """Streams tokens into a native trace; made when the first pass has shown what is traced."""

    def __init__(
        self,
        path: Path,
        *,
        num_experts: int,
        layer_ids: Sequence[int],
        top_k: int,
        model: ModelDims,
        weights: bool,
        force: bool,
        source: dict[str, Any],
    ) -> None:
        from placer.trace.store import TraceWriter

        self._writer: TraceWriter = TraceWriter(
            path,
            num_experts=num_experts,
            layer_ids=layer_ids,
            top_k=top_k,
            model=model,
            weights=weights,
            step=True,
            force=force,
            source=source,
        )

    def append(self, **columns: Any) -> None:
        self._writer.append(**columns)

    def close(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what is in memory; after an error, the trace is not marked as whole."""
        self._writer.__exit__(kind, error, traceback)


Sink: TypeAlias = MemorySink | FolderSink

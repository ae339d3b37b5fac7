"""A digest of what a trace says, whatever the file it lies in."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from placer.trace.model import Trace
    from placer.trace.source import TraceSource


def fingerprint(source: TraceSource) -> str:
    """Hex digest of experts, request, position, phase, num_experts and layer_ids.

    The same for an imported file and its native copy, and for any cutting into parts and
    chunks: every column is hashed as one stream of little-endian numbers, the experts as the
    stream of used ids and the stream of their counts, so that padding does not matter.
    Gate weights, labels, steps and homes are left out. The order of tokens matters.
    """
    digest = Fingerprint(source.num_experts, source.layer_ids)
    for chunk in source.chunks(with_weights=False):
        digest.update(chunk)
    return digest.hexdigest()


class Fingerprint:
    """`fingerprint` of chunks that come one by one.

    Args:
        num_experts: E.
        layer_ids: [L].
    """

    def __init__(self, num_experts: int, layer_ids: NDArray[np.int64]) -> None:
        self._head = f"{num_experts} {layer_ids.tolist()}\n"
        self._columns = {
            name: hashlib.sha256() for name in ("counts", "experts", "request", "position", "phase")
        }

    def update(self, chunk: Trace) -> None:
        """Take up the next tokens."""
        used = chunk.experts >= 0
        if used.all():
            counts = np.full(used.shape[:2], used.shape[2], np.uint16)
            ids = chunk.experts
        else:
            counts = used.sum(axis=2, dtype=np.uint16)
            ids = chunk.experts[used]
        self._columns["counts"].update(_bytes(counts, "<u2"))
        self._columns["experts"].update(_bytes(ids, f"<i{ids.dtype.itemsize}"))
        self._columns["request"].update(_bytes(chunk.request, "<i8"))
        self._columns["position"].update(_bytes(chunk.position, "<i8"))
        self._columns["phase"].update(_bytes(chunk.phase, "u1"))

    def hexdigest(self) -> str:
        """The digest of what was taken up so far."""
        whole = hashlib.sha256(b"placer.trace fingerprint 1\n")
        whole.update(self._head.encode())
        for name, column in self._columns.items():
            whole.update(f"{name} {column.hexdigest()}\n".encode())
        return whole.hexdigest()


def _bytes(values: NDArray[Any], dtype: str) -> memoryview:
    """The numbers as one run of bytes of a fixed type, copied only where they are not that yet."""
    return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data

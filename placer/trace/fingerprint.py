"""A digest of what a trace says, whatever the file it lies in."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from placer.trace.source import TraceSource


def fingerprint(source: TraceSource) -> str:
    """Hex digest of experts, request, position, phase, num_experts and layer_ids.

    The same for an imported file and its native copy, and for any cutting into parts and
    chunks: every column is hashed as one stream of little-endian numbers, the experts as the
    stream of used ids and the stream of their counts, so that padding does not matter.
    Gate weights, labels, steps and homes are left out. The order of tokens matters.
    """
    columns = {name: hashlib.sha256() for name in ("counts", "experts", *_PER_TOKEN)}
    for chunk in source.chunks(with_weights=False):
        used = chunk.experts >= 0
        if used.all():
            counts = np.full(used.shape[:2], used.shape[2], "<u4")
            ids = chunk.experts
        else:
            counts = used.sum(axis=2, dtype=np.uint32)
            ids = chunk.experts[used]
        width = chunk.experts.dtype.itemsize
        columns["counts"].update(_bytes(counts, "<u4"))
        columns["experts"].update(_bytes(ids, f"<i{width}"))
        for name in ("request", "position"):
            columns[name].update(_bytes(getattr(chunk, name), "<i8"))
        columns["phase"].update(_bytes(chunk.phase, "u1"))
    whole = hashlib.sha256(b"placer.trace fingerprint 1\n")
    whole.update(f"{source.num_experts} {source.layer_ids.tolist()}\n".encode())
    for name, digest in columns.items():
        whole.update(f"{name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()


def _bytes(values: NDArray[Any], dtype: str) -> memoryview:
    """The numbers as one run of bytes of a fixed type, copied only where they are not that yet."""
    return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data


_PER_TOKEN = ("request", "position", "phase")

"""`TokenBuffer`: the tokens that wait to become a part of a native trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.trace import columns
from placer.trace.checks import expert_dtype
from placer.trace.layout import Manifest


class TokenBuffer:
    """Arrays of `part_tokens` tokens that fill up, call by call."""

    def __init__(self, manifest: Manifest, part_tokens: int) -> None:
        shape = (part_tokens, len(manifest.layer_ids), manifest.top_k)
        self.filled = 0
        self._size = part_tokens
        self._arrays: dict[str, NDArray[Any]] = {
            "experts": np.empty(shape, expert_dtype(manifest.num_experts)),
            **{
                name: np.empty(part_tokens, np.uint8 if name == "phase" else np.int64)
                for name in columns.token_columns(manifest)
            },
        }
        if manifest.weights:
            self._arrays["weights"] = np.empty(shape, np.float32)
        self._labels: list[str | None] = []

    @property
    def is_full(self) -> bool:
        return self.filled == self._size

    def take(
        self,
        arrays: dict[str, NDArray[Any] | None],
        labels: Sequence[str | None] | None,
        start: int,
        stop: int,
    ) -> int:
        """Copy tokens from `start` on, as many as fit; return how many."""
        count = min(self._size - self.filled, stop - start)
        here = slice(self.filled, self.filled + count)
        for name, buffer in self._arrays.items():
            values = arrays[name]
            assert values is not None
            taken = values[start : start + count]
            if buffer.ndim == 3:
                width = taken.shape[2]
                buffer[here, :, :width] = taken
                buffer[here, :, width:] = -1 if name == "experts" else 0
            else:
                buffer[here] = taken
        del self._labels[self.filled :]
        self._labels += (
            [None] * count if labels is None else [x or None for x in labels[start : start + count]]
        )
        self.filled += count
        return count

    def row_groups(self) -> list[tuple[dict[str, NDArray[Any] | None], list[str | None]]]:
        """Views of the tokens, cut into row groups."""
        groups = []
        for start in range(0, self.filled, columns.ROW_GROUP_TOKENS):
            stop = min(start + columns.ROW_GROUP_TOKENS, self.filled)
            arrays: dict[str, NDArray[Any] | None] = {
                name: values[start:stop] for name, values in self._arrays.items()
            }
            groups.append((arrays, self._labels[start:stop]))
        return groups

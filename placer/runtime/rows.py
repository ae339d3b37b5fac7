"""A token on its way: its hidden state, the slots that serve it, and their weights, as bytes.

Shapes: n tokens, D hidden size, K experts per token at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens with what routing says of them.

    Attributes:
        hidden: [n, D].
        slots: [n, K] int32, the physical slot that serves each pair, -1 = none.
        weights: [n, K] float32 gate weights, 0 where there is no slot.
        row: [n] int32, the token's row in the batch; None where rows do not travel.
    """

    hidden: Tensor
    slots: Tensor
    weights: Tensor
    row: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, index: Tensor) -> Tokens:
        """Some of the tokens."""
        return Tokens(
            self.hidden.index_select(0, index),
            self.slots.index_select(0, index),
            self.weights.index_select(0, index),
            None if self.row is None else self.row.index_select(0, index),
        )


def routing_bytes(top_k: int, with_row: bool) -> int:
    """Bytes that go with a hidden state: K slots and weights, and the row."""
    return 8 * top_k + 4 * with_row


def pack(tokens: Tokens) -> Tensor:
    """[n, width] uint8."""
    parts = [tokens.hidden, tokens.slots, tokens.weights]
    if tokens.row is not None:
        parts.append(tokens.row[:, None])
    return torch.cat([as_bytes(part) for part in parts], dim=1)


def unpack(
    rows: Tensor, hidden_size: int, dtype: torch.dtype, top_k: int, with_row: bool
) -> Tokens:
    """What `pack` was given."""
    sizes = [hidden_size * dtype.itemsize, 4 * top_k, 4 * top_k, *([4] if with_row else [])]
    types = [dtype, torch.int32, torch.float32, torch.int32]
    parts = [
        from_bytes(part, kind)
        for part, kind in zip(torch.split(rows, sizes, dim=1), types, strict=False)
    ]
    row = parts[3].reshape(-1) if with_row else None
    return Tokens(parts[0], parts[1], parts[2], row)


def join(parts: list[Tokens]) -> Tokens:
    """Tokens of several sources, one after the other."""
    rows = [part.row for part in parts if part.row is not None]
    return Tokens(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.slots for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat(rows) if rows else None,
    )


def as_bytes(matrix: Tensor) -> Tensor:
    """[n, D] -> [n, bytes] uint8."""
    if not matrix.numel():  # whose strides may be anything
        width = matrix.shape[1] * matrix.element_size()
        return torch.empty((0, width), dtype=torch.uint8, device=matrix.device)
    return matrix.contiguous().view(torch.uint8)


def from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, bytes] uint8 -> [n, D]."""
    if not rows.numel():
        width = rows.shape[1] // dtype.itemsize
        return torch.empty((0, width), dtype=dtype, device=rows.device)
    return rows.contiguous().view(dtype)

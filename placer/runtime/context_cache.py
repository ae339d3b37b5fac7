"""Keys and values on every rank: views of some rows, and the exchange of what a pass has made.

Shapes: B rows (requests), n tokens made here, P columns (positions) in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from placer.runtime.counters import LINKS, Counters
from placer.runtime.gather import all_gather
from placer.runtime.transport import Transport

if TYPE_CHECKING:
    from transformers import Cache

Shapes = Sequence[tuple[tuple[int, int], tuple[int, int]]]


@dataclass(eq=False)
class NewContext:
    """What attention made on one rank.

    Attributes:
        by_layer: index of the decoder layer -> row of each token [n] int32, its keys and its
            values [n, heads, width].
        rows: [m] rows that have a next token here.
        next_tokens: [m] int64.
    """

    by_layer: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    next_tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class RowView:
    """The cache as attention sees it when only some rows are here.

    Args:
        cache: keys and values [B, heads, P, width] of all rows.
        rows: [n] the rows that are here.
        new: where keys and values of this pass are put.
    """

    def __init__(self, cache: Cache, rows: Tensor, new: NewContext) -> None:
        self._cache, self._rows, self._new = cache, rows, new

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of these rows, old and new; the cache itself stays as it is."""
        self._new.by_layer[layer_idx] = (self._rows.int(), keys[:, :, 0], values[:, :, 0])
        held = self._cache.layers[layer_idx]
        return (
            torch.cat((held.keys.index_select(0, self._rows), keys), dim=-2),
            torch.cat((held.values.index_select(0, self._rows), values), dim=-2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self._cache.get_seq_length(layer_idx))


@dataclass(frozen=True)
class ContextBytes:
    """What every other rank is sent of a token's context, over all decoder layers.

    Attributes:
        kv: keys and values.
        rows: the token's row in the batch, which goes with them.
    """

    kv: int = 0
    rows: int = 0


def token_bytes(shapes: Shapes, dtype: torch.dtype) -> ContextBytes:
    """Of one token."""
    elements = sum(heads * width for pair in shapes for heads, width in pair)
    return ContextBytes(elements * dtype.itemsize, 4 * len(shapes))


def share_context(
    transport: Transport,
    new: NewContext,
    shapes: Shapes,
    dtype: torch.dtype,
    most_of_rank: Sequence[int],
    counters: Counters,
) -> list[NewContext]:
    """What every rank has made, by rank: one all-gather.

    Args:
        transport: moves bytes.
        new: what was made here.
        shapes: of keys and values of each decoder layer.
        dtype: of keys and values.
        most_of_rank: [G] the most tokens that each rank may have in a layer.
        counters: counts bytes of keys and values, and the rest as control.
    """
    num_layers = len(shapes)
    of_token = token_bytes(shapes, dtype)
    per_token = of_token.kv + of_token.rows + 12  # 12: a row's next token
    message = _pack(new, num_layers)
    bounds = [4 * (num_layers + 1) + most * per_token for most in most_of_rank]
    parts, sent = all_gather(
        transport, message[:, None], bounds, "the all-gather of keys and values", counters
    )
    found = [_unpack(part.reshape(-1), shapes, dtype) for part in parts]
    _count(transport, found, shapes, dtype, sent, counters)
    return found


def _pack(new: NewContext, num_layers: int) -> Tensor:
    empty = torch.empty(0, dtype=torch.int32, device=new.rows.device)
    made = [new.by_layer.get(i, (empty, empty, empty)) for i in range(num_layers)]
    counts = torch.tensor(
        [*(len(rows) for rows, _, _ in made), len(new.rows)], dtype=torch.int32,
        device=new.rows.device,
    )  # fmt: skip
    parts = [counts]
    for part in made:
        parts += part
    parts += [new.rows.int(), new.next_tokens]
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def _unpack(message: Tensor, shapes: Shapes, dtype: torch.dtype) -> NewContext:
    at = 0

    def take(count: int, kind: torch.dtype) -> Tensor:
        nonlocal at
        size = count * kind.itemsize
        part = message[at : at + size].clone().view(kind)
        at += size
        return part

    counts = take(len(shapes) + 1, torch.int32).tolist()
    new = NewContext()
    for i, ((key_heads, key_width), (value_heads, value_width)) in enumerate(shapes):
        rows = take(counts[i], torch.int32)
        keys = take(counts[i] * key_heads * key_width, dtype)
        values = take(counts[i] * value_heads * value_width, dtype)
        new.by_layer[i] = (
            rows,
            keys.view(counts[i], key_heads, key_width),
            values.view(counts[i], value_heads, value_width),
        )
    new.rows = take(counts[-1], torch.int32)
    new.next_tokens = take(counts[-1], torch.int64)
    return new


def _count(
    transport: Transport,
    found: list[NewContext],
    shapes: Shapes,
    dtype: torch.dtype,
    sent: np.ndarray,
    counters: Counters,
) -> None:
    """Tell keys and values from row numbers and tokens in what this rank sent."""
    of_rank = [
        sum(k.numel() + v.numel() for _, k, v in new.by_layer.values()) * dtype.itemsize
        for new in found
    ]
    step = transport.context.ranks_per_node
    column = range(transport.rank % step, transport.num_ranks, step)
    kv = np.zeros_like(sent)
    kv[LINKS.index("other_node")] = of_rank[transport.rank] * len(transport.counterparts())
    kv[LINKS.index("same_node")] = sum(of_rank[r] for r in column) * len(transport.node_peers())
    counters.kv_bytes += kv
    counters.control_bytes += int((sent - kv).sum())


def append_context(cache: Cache, found: list[NewContext], starts: Tensor, width: int) -> None:
    """Put keys and values of all ranks into the cache, in `width` new columns.

    Args:
        cache: of all B rows.
        found: from `share_context`; the tokens of a row are on one rank, in their order.
        starts: [B] int64, the new column where each row's tokens begin.
        width: new columns.
    """
    for layer in range(len(found[0].by_layer)):
        rows = torch.cat([new.by_layer[layer][0] for new in found]).long()
        columns = starts[rows] + _running(rows)
        held = [torch.cat([new.by_layer[layer][i] for new in found]) for i in (1, 2)]
        placed = []
        for tokens in held:  # [n, heads, width of a head]
            table = tokens.new_zeros((len(starts), width, *tokens.shape[1:]))
            table[rows, columns] = tokens
            placed.append(table.transpose(1, 2))
        cache.update(placed[0], placed[1], layer)


def _running(rows: Tensor) -> Tensor:
    """[n] how many earlier entries are equal: 5 5 5 2 2 -> 0 1 2 0 1; equal ones are neighbours."""
    index = torch.arange(len(rows), device=rows.device)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[1:] = rows[1:] != rows[:-1]
    return index - torch.where(is_first, index, 0).cummax(0).values if len(rows) else index

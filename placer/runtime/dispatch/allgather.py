"""All-gather and reduce-scatter: every rank sees every token, and adds what its experts make of it.

What goes over the links does not depend on the placement; only balance does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from placer.runtime.counters import LINKS
from placer.runtime.dispatch.common import COMBINE, DISPATCH, Group
from placer.runtime.gather import all_gather, reduce_scatter
from placer.runtime.rows import Tokens, join, pack, routing_bytes, unpack


def allgather(group: Group, layer: int, tokens: Tokens) -> Tensor:
    """[T, D] sum over each token's experts of weight x output, wherever they are.

    Args and result: as `alltoall`.
    """
    counters, transport = group.counters, group.transport
    hidden_size, dtype = tokens.hidden.shape[1], tokens.hidden.dtype
    top_k = tokens.slots.shape[1]
    width, extra = hidden_size * dtype.itemsize, routing_bytes(top_k, False)
    with counters.timed(layer, "dispatch"):
        rows, sent = all_gather(
            transport, pack(tokens), group.tokens_of_rank,
            f"the all-gather of MoE layer {layer}", counters,
        )  # fmt: skip
        _count(group, layer, DISPATCH, sent, width, extra)
        everyone = [unpack(part, hidden_size, dtype, top_k, False) for part in rows]
    with counters.timed(layer, "compute"):
        sums = group.banks[layer].partial_sums(join(everyone), counters)
        parts = torch.split(sums, [len(part) for part in everyone])
    with counters.timed(layer, "combine"):
        what = f"the reduce-scatter of MoE layer {layer}"
        total, sent = reduce_scatter(transport, parts, what, counters)
        _count(group, layer, COMBINE, sent, width, 0)
    return total


def _count(group: Group, layer: int, way: int, sent: np.ndarray, width: int, extra: int) -> None:
    for link, count in zip(LINKS, sent, strict=True):
        group.counters.sent(layer, way, link, int(count), width, extra)

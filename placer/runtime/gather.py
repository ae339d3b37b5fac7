"""All-gather and reduce-scatter of rows, in two stages where there are several nodes.

Between nodes a rank talks only to the ranks with its own number there, so that every row crosses to
another node once; within a node everybody then passes on what they have. This is the all-gather
that docs/metrics.md prices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from placer.runtime.counters import LINKS, Counters
from placer.runtime.rows import as_bytes, from_bytes
from placer.runtime.transport import Transport


def all_gather(
    transport: Transport,
    rows: Tensor,
    most_of_rank: Sequence[int],
    what: str,
    counters: Counters,
) -> tuple[list[Tensor], NDArray[np.int64]]:
    """The rows of every rank, by rank.

    Args:
        transport: moves bytes.
        rows: [n, width] uint8 of this rank, n may be 0.
        most_of_rank: [G] the most rows that each rank may have.
        what: for messages.
        counters: counts one collective.

    Returns:
        [G] rows of each rank; and [3] rows that this rank sent, by link.
    """
    step = transport.context.ranks_per_node
    width = rows.shape[1]
    sent = np.zeros(len(LINKS), np.int64)
    counters.collectives["all_gather"] += 1
    found: dict[int, Tensor] = {transport.rank: rows}
    across = transport.counterparts()
    if across:
        most = {rank: most_of_rank[rank] for rank in across}
        found |= transport.exchange(dict.fromkeys(across, rows), most, width, what, counters)
        sent[LINKS.index("other_node")] += len(rows) * len(across)
    peers = transport.node_peers()
    if peers:
        # which of the rows are of which node: the number of each node's rows goes ahead of them
        column = sorted(found)
        counts = torch.tensor([len(found[rank]) for rank in column], device=rows.device)
        head = _as_rows(counts, width)
        message = torch.cat((head, *(found[rank] for rank in column)))
        most = {
            peer: len(head)
            + sum(most_of_rank[r] for r in range(peer % step, transport.num_ranks, step))
            for peer in peers
        }
        messages = transport.exchange(dict.fromkeys(peers, message), most, width, what, counters)
        sent[LINKS.index("same_node")] += (len(message) - len(head)) * len(peers)
        for peer, received in messages.items():
            theirs = range(peer % step, transport.num_ranks, step)
            sizes = _from_rows(received[: len(head)], len(theirs))
            parts = torch.split(received[len(head) :], sizes)
            found |= dict(zip(theirs, parts, strict=True))
    return [found[rank] for rank in range(transport.num_ranks)], sent


def reduce_scatter(
    transport: Transport,
    parts: Sequence[Tensor],
    what: str,
    counters: Counters,
) -> tuple[Tensor, NDArray[np.int64]]:
    """The sum over ranks of what each has for this rank.

    Args:
        transport: moves bytes.
        parts: [G] what this rank has for each rank, [n_g, D]; the same n_g on every rank.
        what: for messages.
        counters: counts one collective.

    Returns:
        [n, D] the sum for this rank; and [3] rows that this rank sent, by link.
    """
    step = transport.context.ranks_per_node
    size, dtype = parts[0].shape[1], parts[0].dtype
    width = size * dtype.itemsize
    sent = np.zeros(len(LINKS), np.int64)
    counters.collectives["reduce_scatter"] += 1
    columns = [
        torch.cat([parts[r] for r in range(own, transport.num_ranks, step)]) for own in range(step)
    ]
    own_column = transport.rank % step
    total = columns[own_column]
    peers = transport.node_peers()
    if peers:
        outgoing = {peer: as_bytes(columns[peer % step]) for peer in peers}
        most = dict.fromkeys(peers, len(total))
        sent[LINKS.index("same_node")] += sum(len(rows) for rows in outgoing.values())
        received = transport.exchange(outgoing, most, width, what, counters)
        total = _sum({**{p: from_bytes(r, dtype) for p, r in received.items()},
                      transport.rank: total})  # fmt: skip
    across = transport.counterparts()
    if not across:
        return total, sent
    column = range(own_column, transport.num_ranks, step)
    pieces = dict(zip(column, torch.split(total, [len(parts[r]) for r in column]), strict=True))
    outgoing = {rank: as_bytes(pieces[rank]) for rank in across}
    sent[LINKS.index("other_node")] += sum(len(rows) for rows in outgoing.values())
    most = dict.fromkeys(across, len(parts[transport.rank]))
    received = transport.exchange(outgoing, most, width, what, counters)
    return _sum({**{p: from_bytes(r, dtype) for p, r in received.items()},
                 transport.rank: pieces[transport.rank]}), sent  # fmt: skip


def _sum(parts: dict[int, Tensor]) -> Tensor:
    """In the order of ranks, so that the result does not depend on who came first."""
    ordered = [parts[rank] for rank in sorted(parts)]
    total = ordered[0].clone()
    for part in ordered[1:]:
        total += part
    return total


def _as_rows(numbers: Tensor, width: int) -> Tensor:
    """Numbers as whole rows of bytes, filled up with zeros."""
    flat = numbers.view(torch.uint8)
    filled = torch.zeros(-(-flat.numel() // width) * width, dtype=torch.uint8, device=flat.device)
    filled[: flat.numel()] = flat
    return filled.view(-1, width)


def _from_rows(rows: Tensor, count: int) -> list[int]:
    found: list[int] = rows.reshape(-1)[: 8 * count].clone().view(torch.int64).tolist()
    return found

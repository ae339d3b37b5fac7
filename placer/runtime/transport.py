"""Moving bytes between ranks: one exchange of messages whose sizes the receivers do not know.

On CPUs (gloo) an exchange is one message to every peer, headed by the number of its rows, into a
buffer of the largest size that may come: gloo takes a shorter message than was asked for. So
an exchange is a single round. On GPUs (NCCL) sizes must be known: they are exchanged first.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from placer.errors import PlacerError
from placer.runtime.context import RankContext
from placer.runtime.counters import Counters, Link

_HEADER_BYTES = 8


class PeerLostError(PlacerError):
    """Another rank ended, or did not answer in time."""


class Transport:
    """Exchanges rows of bytes with other ranks.

    Args:
        context: who this rank is.
        device: where rows live; a CUDA device means NCCL.

    Attributes:
        context: as given.
        device: as given.
    """

    def __init__(self, context: RankContext, device: torch.device) -> None:
        self.context = context
        self.device = device
        self._timeout = datetime.timedelta(seconds=context.timeout_s)

    @property
    def rank(self) -> int:
        return self.context.rank

    @property
    def num_ranks(self) -> int:
        return self.context.num_ranks

    def peers(self) -> list[int]:
        """All other ranks."""
        return [rank for rank in range(self.num_ranks) if rank != self.rank]

    def node_peers(self) -> list[int]:
        """The other ranks of this node."""
        first = self.context.node * self.context.ranks_per_node
        return [r for r in range(first, first + self.context.ranks_per_node) if r != self.rank]

    def counterparts(self) -> list[int]:
        """The ranks with the same number within their nodes, on the other nodes."""
        step = self.context.ranks_per_node
        own = self.rank % step
        return [r for r in range(own, self.num_ranks, step) if r != self.rank]

    def link(self, rank: int) -> Link:
        """What kind of link leads from this rank to another."""
        if rank == self.rank:
            return "same_rank"
        same = rank // self.context.ranks_per_node == self.context.node
        return "same_node" if same else "other_node"

    def exchange(
        self,
        outgoing: Mapping[int, Tensor],
        most: Mapping[int, int],
        width: int,
        what: str,
        counters: Counters,
    ) -> dict[int, Tensor]:
        """Send rows to peers and receive theirs; every peer must call it with this rank as peer.

        Args:
            outgoing: peer -> uint8 rows [n, width], n may be 0.
            most: peer -> the most rows that may come from it; the same peers as in `outgoing`.
            width: bytes of a row.
            what: for messages, e.g. "the dispatch of layer 3".
            counters: counts headers.

        Returns:
            Peer -> uint8 rows [n, width].

        Raises:
            PeerLostError: a peer ended or did not answer in time.
        """
        if self.device.type == "cuda":
            return self._exchange_nccl(outgoing, width, what, counters)
        receiving = []
        try:
            for peer, bound in most.items():
                buffer = torch.empty(_HEADER_BYTES + bound * width, dtype=torch.uint8)
                receiving.append((peer, buffer, dist.irecv(buffer, peer)))
            sending = []
            for peer, rows in outgoing.items():
                header = torch.tensor([len(rows)]).view(torch.uint8)
                message = torch.cat((header, rows.reshape(-1)))
                sending.append((peer, message, dist.isend(message, peer)))
                counters.control_bytes += _HEADER_BYTES
        except RuntimeError as error:
            raise self._lost(None, what, error) from None
        received = {}
        for peer, buffer, work in receiving:
            self._wait(work, peer, what)
            count = int(buffer[:_HEADER_BYTES].view(torch.int64))
            assert 0 <= count <= most[peer], f"{count} rows from rank {peer}, at most {most[peer]}"
            body = buffer[_HEADER_BYTES : _HEADER_BYTES + count * width]
            received[peer] = body.view(count, width)
        for peer, _, work in sending:
            self._wait(work, peer, what)
        return received

    def barrier(self, what: str, counters: Counters) -> None:
        """Wait until every rank has come here."""
        nothing = torch.zeros((0, 1), dtype=torch.uint8, device=self.device)
        peers = self.peers()
        self.exchange(dict.fromkeys(peers, nothing), dict.fromkeys(peers, 0), 1, what, counters)

    def _exchange_nccl(
        self, outgoing: Mapping[int, Tensor], width: int, what: str, counters: Counters
    ) -> dict[int, Tensor]:
        """Sizes first, then the rows; every rank takes part, with nothing for those not named."""
        counts = [len(outgoing[r]) if r in outgoing else 0 for r in range(self.num_ranks)]
        sizes = torch.tensor(counts, device=self.device)
        incoming = torch.empty_like(sizes)
        try:
            dist.all_to_all_single(incoming, sizes)
            counters.collectives["size_exchange"] += 1
            counters.control_bytes += _HEADER_BYTES * (self.num_ranks - 1)
            expected = incoming.tolist()
            nothing = torch.empty((0, width), dtype=torch.uint8, device=self.device)
            rows = torch.cat([outgoing.get(r, nothing) for r in range(self.num_ranks)])
            received = torch.empty((sum(expected), width), dtype=torch.uint8, device=self.device)
            dist.all_to_all_single(received, rows, expected, counts)
        except RuntimeError as error:
            raise self._lost(None, what, error) from None
        parts = torch.split(received, expected)
        return {peer: parts[peer] for peer in outgoing}

    def _wait(self, work: Any, peer: int, what: str) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(peer, what, error) from None

    def _lost(self, peer: int | None, what: str, error: RuntimeError) -> PeerLostError:
        who = "another rank" if peer is None else f"rank {peer}"
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "imed out" in text:
            cause = f"{who} did not answer within {self.context.timeout_s:g} s"
        else:
            cause = f"{who} is gone ({text})"
        return PeerLostError(f"rank {self.rank}: {cause} during {what}")

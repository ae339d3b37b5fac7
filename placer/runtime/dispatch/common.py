"""What every dispatch model works with on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from placer.placement import Placement
from placer.runtime.bank import Bank
from placer.runtime.counters import Counters
from placer.runtime.rows import Tokens, pack, routing_bytes, unpack
from placer.runtime.transport import Transport

DISPATCH, COMBINE = 0, 1


@dataclass(eq=False)
class Group:
    """One rank's part of an expert-parallel group.

    Attributes:
        placement: where the experts are.
        transport: moves bytes.
        counters: counts them.
        banks: [L] the experts here.
        tokens_of_rank: [G] the most tokens that each rank may bring to the pass that runs now.
    """

    placement: Placement
    transport: Transport
    counters: Counters
    banks: list[Bank]
    tokens_of_rank: Sequence[int] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.transport.rank

    def members(self, slots: Tensor) -> Tensor:
        """[T, G] whether each rank serves one of a token's pairs; slots [T, K]."""
        ranks = slots.long() // self.placement.slots_per_rank  # -1 // S = -1
        num_ranks = self.transport.num_ranks
        found = torch.zeros((len(slots), num_ranks + 1), dtype=torch.bool, device=slots.device)
        found.scatter_(1, torch.where(slots >= 0, ranks, num_ranks), True)
        return found[:, :num_ranks]

    def share_of(self, tokens: Tokens, ranks: Tensor) -> Tokens:
        """The same tokens with only those pairs that the ranks [G] (bool) serve."""
        owner = (tokens.slots.long() // self.placement.slots_per_rank).clamp(min=0)
        here = ranks[owner] & (tokens.slots >= 0)
        return Tokens(
            tokens.hidden,
            torch.where(here, tokens.slots, -1),
            torch.where(here, tokens.weights, 0),
            tokens.row,
        )

    def only(self, rank: int) -> Tensor:
        """[G] true for one rank."""
        chosen = torch.zeros(self.transport.num_ranks, dtype=torch.bool)
        chosen[rank] = True
        return chosen.to(self.transport.device)

    def send_tokens(
        self, layer: int, outgoing: dict[int, Tokens], most: dict[int, int], top_k: int,
        hidden_size: int, dtype: torch.dtype, with_row: bool = False,
    ) -> dict[int, Tokens]:  # fmt: skip
        """Exchange tokens with the ranks in `outgoing`; what comes from each of them."""
        extra = routing_bytes(top_k, with_row)
        width = hidden_size * dtype.itemsize
        for peer, tokens in outgoing.items():
            link = self.transport.link(peer)
            self.counters.sent(layer, DISPATCH, link, len(tokens), width, extra)
        received = self.transport.exchange(
            {peer: pack(tokens) for peer, tokens in outgoing.items()},
            most,
            width + extra,
            f"the dispatch of MoE layer {layer}",
            self.counters,
        )
        return {
            peer: unpack(rows, hidden_size, dtype, top_k, with_row)
            for peer, rows in received.items()
        }

    def send_hidden(
        self, layer: int, outgoing: dict[int, Tensor], most: dict[int, int], width: int,
        extra: int = 0,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Exchange results: uint8 rows of `width` bytes, of which `extra` are row numbers."""
        for peer, rows in outgoing.items():
            link = self.transport.link(peer)
            self.counters.sent(layer, COMBINE, link, len(rows), width - extra, extra)
        what = f"the combine of MoE layer {layer}"
        return self.transport.exchange(outgoing, most, width, what, self.counters)

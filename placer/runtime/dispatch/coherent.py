"""ExFlow's context-coherent expert parallelism: tokens stay where their primary expert is.

A token is sent from where it is to every distinct rank that serves one of its experts. The rank of
its primary expert (highest weight, ties to the first column) becomes its home: the others send
their partial sums there, not back. With one expert per token nothing else is sent: one exchange per
layer. What travels is the residual stream, which the receiver normalises itself, so that its
next attention can run there (Yao et al., "Exploiting Inter-Layer Expert Affinity for Accelerating
Mixture-of-Experts Model Inference", 2024; here carried to top-k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from placer.runtime.dispatch.common import DISPATCH, Group
from placer.runtime.rows import Tokens, as_bytes, from_bytes, join


@dataclass(frozen=True, eq=False)
class Landed:
    """Tokens whose home is now this rank, by increasing row.

    Attributes:
        row: [n] int32 rows in the batch.
        residual: [n, D] the residual stream before the experts.
        normalised: [n, D] what the experts were given.
        total: [n, D] sum over all the token's experts of weight x output.
    """

    row: Tensor
    residual: Tensor
    normalised: Tensor
    total: Tensor


def coherent(
    group: Group, layer: int, tokens: Tokens, normalise: Callable[[Tensor], Tensor]
) -> Landed:
    """Move tokens to their primary experts' ranks and add up what all their experts make of them.

    Args:
        group: this rank's part; every rank calls this for every layer.
        layer: index of the MoE layer.
        tokens: tokens whose home is this rank, with their residual stream and rows.
        normalise: [n, D] residual stream -> what the experts are given.
    """
    counters, transport = group.counters, group.transport
    peers = transport.peers()
    hidden_size, dtype = tokens.hidden.shape[1], tokens.hidden.dtype
    top_k = tokens.slots.shape[1]
    width = hidden_size * dtype.itemsize
    with counters.timed(layer, "dispatch"):
        members = group.members(tokens.slots)
        stays = members[:, group.rank] | ~members.any(dim=1)  # a token without experts stays
        own = tokens.select(stays.nonzero().reshape(-1))
        counters.sent(layer, DISPATCH, "same_rank", int(members[:, group.rank].sum()), width, 0)
        outgoing = {p: tokens.select(members[:, p].nonzero().reshape(-1)) for p in peers}
        most = {peer: group.tokens_of_rank[peer] for peer in peers}
        arrived = group.send_tokens(layer, outgoing, most, top_k, hidden_size, dtype, with_row=True)
        counters.collectives["all_to_all"] += 1
        here = join([own, *(arrived[peer] for peer in peers)])
        home = _primary_rank(group, here)
        lands = (home == group.rank).nonzero().reshape(-1)
        assert here.row is not None
        lands = lands[here.row[lands].argsort()]
        landed = here.select(lands)
        assert landed.row is not None
    with counters.timed(layer, "compute"):
        normalised = normalise(here.hidden)
        given = Tokens(normalised, here.slots, here.weights)
        sums = group.banks[layer].partial_sums(given, counters)
        total = sums.index_select(0, lands)
    if top_k > 1:
        with counters.timed(layer, "combine"):
            back = {}
            for peer in peers:
                index = (home == peer).nonzero().reshape(-1)
                rows = here.row[index, None]
                back[peer] = torch.cat((as_bytes(sums[index]), as_bytes(rows)), dim=1)
            returned = group.send_hidden(
                layer, back, dict.fromkeys(peers, len(lands)), width + 4, extra=4
            )
            counters.collectives["all_to_all"] += 1
            for peer in peers:
                rows = from_bytes(returned[peer][:, width:], torch.int32).reshape(-1)
                at = torch.searchsorted(landed.row, rows)
                total.index_add_(0, at, from_bytes(returned[peer][:, :width], dtype))
    return Landed(landed.row, landed.hidden, normalised.index_select(0, lands), total)


def _primary_rank(group: Group, tokens: Tokens) -> Tensor:
    """[n] rank of each token's primary expert; this rank where it has no experts."""
    masked = tokens.weights.masked_fill(tokens.slots < 0, -torch.inf)
    column = masked.argmax(dim=1, keepdim=True)
    slot = tokens.slots.gather(1, column).reshape(-1).long()
    return torch.where(slot < 0, group.rank, slot // group.placement.slots_per_rank)

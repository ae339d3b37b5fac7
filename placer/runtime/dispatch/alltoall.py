"""Standard expert parallelism: tokens go to their experts' ranks and their results come back.

A token is sent once to every distinct rank that serves one of its experts, with the slots and
weights of those; that rank adds up its experts' outputs, and one sum comes back (as in DeepEP,
`deep_ep/buffer.py`, `dispatch` and `combine`). Two exchanges per layer. With `deduplicate_nodes` a
token goes once to every distinct other node, to the rank there with the home's number, which passes
it on over the fast links and adds up what comes back: four exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from placer.runtime.dispatch.common import DISPATCH, Group
from placer.runtime.rows import Tokens, as_bytes, from_bytes, join


def alltoall(group: Group, layer: int, tokens: Tokens) -> Tensor:
    """[T, D] sum over each token's experts of weight x output, wherever they are.

    Args:
        group: this rank's part; every rank calls this for every layer.
        layer: index of the MoE layer.
        tokens: [T] tokens whose home is this rank, perhaps none.
    """
    peers = group.transport.peers()
    return _there_and_back(group, layer, tokens, peers, group.tokens_of_rank)


def alltoall_by_node(group: Group, layer: int, tokens: Tokens) -> Tensor:
    """The same with one copy of a token per other node."""
    counters, transport = group.counters, group.transport
    step = transport.context.ranks_per_node
    width = tokens.hidden.shape[1] * tokens.hidden.element_size()
    dtype = tokens.hidden.dtype
    relays = transport.counterparts()
    with counters.timed(layer, "dispatch"):
        members = group.members(tokens.slots)
        sent = {}
        outgoing = {}
        for relay in relays:
            node = _ranks_of_node(group, relay // step)
            sent[relay] = members[:, node].any(dim=1).nonzero().reshape(-1)
            outgoing[relay] = group.share_of(tokens.select(sent[relay]), node)
        most = {relay: group.tokens_of_rank[relay] for relay in relays}
        top_k = tokens.slots.shape[1]
        arrived = group.send_tokens(layer, outgoing, most, top_k, tokens.hidden.shape[1], dtype)
        counters.collectives["all_to_all"] += 1
        own_node = _ranks_of_node(group, transport.context.node)
        # what this rank must see served within its node: its own tokens, then those of each relay
        parts = [group.share_of(tokens, own_node), *(arrived[relay] for relay in relays)]
        here = join(parts)
    by_column = [
        sum(group.tokens_of_rank[r] for r in range(own, transport.num_ranks, step))
        for own in range(step)
    ]
    most_of_rank = [by_column[rank % step] for rank in range(transport.num_ranks)]
    sums = _there_and_back(group, layer, here, transport.node_peers(), most_of_rank)
    with counters.timed(layer, "combine"):
        pieces = torch.split(sums, [len(part) for part in parts])
        back = {r: as_bytes(piece) for r, piece in zip(relays, pieces[1:], strict=True)}
        counts = {relay: len(index) for relay, index in sent.items()}
        returned = group.send_hidden(layer, back, counts, width)
        counters.collectives["all_to_all"] += 1
        total = pieces[0].clone()
        for relay in relays:
            total.index_add_(0, sent[relay], from_bytes(returned[relay], dtype))
    return total


def _there_and_back(
    group: Group, layer: int, tokens: Tokens, peers: list[int], most_of_rank: Sequence[int]
) -> Tensor:
    """Have tokens served by this rank and its peers, and their results brought back."""
    counters = group.counters
    hidden_size, dtype = tokens.hidden.shape[1], tokens.hidden.dtype
    width = hidden_size * dtype.itemsize
    with counters.timed(layer, "dispatch"):
        members = group.members(tokens.slots)
        index = {rank: members[:, rank].nonzero().reshape(-1) for rank in [group.rank, *peers]}
        shares = {
            rank: group.share_of(tokens.select(index[rank]), group.only(rank)) for rank in index
        }
        own = shares.pop(group.rank)
        counters.sent(layer, DISPATCH, "same_rank", len(own), width, 0)
        most = {peer: most_of_rank[peer] for peer in peers}
        top_k = tokens.slots.shape[1]
        arrived = group.send_tokens(layer, shares, most, top_k, hidden_size, dtype)
        counters.collectives["all_to_all"] += 1
    with counters.timed(layer, "compute"):
        parts = [own, *(arrived[peer] for peer in peers)]
        sums = group.banks[layer].partial_sums(join(parts), counters)
        pieces = dict(
            zip([group.rank, *peers], torch.split(sums, [len(p) for p in parts]), strict=True)
        )
    with counters.timed(layer, "combine"):
        back = {peer: as_bytes(pieces[peer]) for peer in peers}
        counts = {peer: len(index[peer]) for peer in peers}
        returned = group.send_hidden(layer, back, counts, width)
        counters.collectives["all_to_all"] += 1
        total = torch.zeros_like(tokens.hidden)
        for rank in sorted(index):
            part = pieces[rank] if rank == group.rank else from_bytes(returned[rank], dtype)
            total.index_add_(0, index[rank], part)
    return total


def _ranks_of_node(group: Group, node: int) -> Tensor:
    """[G] which ranks are of a node."""
    step = group.transport.context.ranks_per_node
    chosen = torch.zeros(group.transport.num_ranks, dtype=torch.bool)
    chosen[node * step : (node + 1) * step] = True
    return chosen.to(group.transport.device)

"""Where messages go: by layer, and from rank to rank.

Shape letters: T tokens, L layers, K experts per token, G ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.cost.serving import ReplicaPolicy, Server, home_ranks, kernel_arrays, turns_of
from placer.placement import Placement
from placer.plan import Dispatch
from placer.trace.model import Trace

_BATCHES_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Flows:
    """Messages of some tokens, as `docs/metrics.md` defines them for the dispatch model.

    Attributes:
        num_tokens: T.
        by_layer: [L] messages.
        by_link: [G, G] messages from the row's rank to the column's, over all layers.
    """

    num_tokens: int
    by_layer: NDArray[np.int64]
    by_link: NDArray[np.int64]


def flows(
    chunks: Iterable[Trace],
    placement: Placement,
    *,
    dispatch: Dispatch,
    replica_policy: ReplicaPolicy,
    batch_tokens: int = 256,
    ignore_home: bool = False,
) -> Flows:
    """Count the messages of a trace's tokens by layer and by link. O(T L K).

    `coherent` counts both ways: from the home to the experts' ranks, and from there to the primary
    expert's rank, the next home. Other models count the way there, from the fixed home. Copies of
    replicated experts are chosen as in replay, but a recorded forward pass that is cut by the end
    of a chunk starts anew.
    """
    server = Server(placement, dispatch, replica_policy)
    num_ranks = placement.num_ranks
    by_layer = np.zeros(placement.num_layers, np.int64)
    by_link = np.zeros((num_ranks, num_ranks), np.int64)
    seen = 0
    for chunk in chunks:
        server.check(chunk)
        home = home_ranks(chunk, num_ranks, ignore_home=ignore_home)
        batch = (seen + np.arange(chunk.num_tokens)) // batch_tokens
        if chunk.step is not None:
            batch = np.unique(chunk.step, return_inverse=True)[1]
        order = np.argsort(batch, kind="stable")
        edges = np.flatnonzero(np.diff(batch[order] // _BATCHES_AT_ONCE)) + 1
        for tokens in np.split(order, edges):
            _add(server, chunk, tokens, home, batch, dispatch == "coherent", by_layer, by_link)
        seen += chunk.num_tokens
    return Flows(seen, by_layer, by_link)


def _add(
    server: Server,
    chunk: Trace,
    tokens: NDArray[np.int64],
    home: NDArray[np.int32],
    batch: NDArray[np.int64],
    coherent: bool,
    by_layer: NDArray[np.int64],
    by_link: NDArray[np.int64],
) -> None:
    """Add the messages of some tokens of a chunk."""
    distinct, row = np.unique(batch[tokens], return_inverse=True)
    experts, weights = kernel_arrays(chunk, tokens)
    at = home[tokens]
    served = server.serve(
        experts,
        weights,
        at,
        turns_of(chunk, tokens),
        row.astype(np.int32),
        server.nothing_sent(distinct.size),
    )
    primary = served[:, :, 0]
    if weights.size:
        best = np.where(experts >= 0, weights, -np.inf).argmax(axis=2)
        primary = np.take_along_axis(served, best[:, :, None], axis=2)[:, :, 0]
    num_ranks = by_link.shape[0]
    token = np.arange(tokens.size)
    for layer in range(served.shape[1]):
        used = np.zeros((tokens.size, num_ranks), np.bool_)
        for k in range(served.shape[2]):
            there = served[:, layer, k]
            used[token[there >= 0], there[there >= 0]] = True
        after = np.where(primary[:, layer] >= 0, primary[:, layer], at) if coherent else at
        sent = used.copy()
        sent[token, at] = False
        _count(sent, at, by_link, towards=False)
        by_layer[layer] += int(sent.sum())
        if coherent:
            back = used
            back[token, after] = False
            _count(back, after, by_link, towards=True)
            by_layer[layer] += int(back.sum())
            at = after


def _count(
    used: NDArray[np.bool_], at: NDArray[np.int32], by_link: NDArray[np.int64], *, towards: bool
) -> None:
    """Add `used` [T, G] to the links from (or towards) the rank `at` [T] of each token."""
    for rank in range(by_link.shape[0]):
        counts = used[at == rank].sum(axis=0)
        if towards:
            by_link[:, rank] += counts
        else:
            by_link[rank] += counts

"""Compiled loops: which rank serves each token-expert pair.

Shape letters: L layers, E experts, G ranks, K experts per token, C copies, N open batches; T is the
tokens of one slice. Every kernel releases the GIL and is cached on disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.compiling import compiled

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Weights = NDArray[np.float32]


@compiled
def serve_round_robin(experts: Ints, ranks: Ints, copies: Ints, turn: Longs, served: Ints) -> None:
    """Give a token copy number turn mod copies of each of its experts.

    Args:
        experts: [T, L, K] logical ids, -1 = unused.
        ranks: [L, E, C] ranks of each expert's copies, increasing.
        copies: [L, E] number of copies.
        turn: [T] request + position of each token.
        served: [T, L, K], written: the rank that serves each pair, -1 = unused.
    """
    num_tokens, num_layers, top_k = experts.shape
    one_copy = ranks.shape[2] == 1
    for t in range(num_tokens):
        for l in range(num_layers):  # noqa: E741
            for k in range(top_k):
                e = experts[t, l, k]
                if e < 0:
                    served[t, l, k] = -1
                elif one_copy:
                    served[t, l, k] = ranks[l, e, 0]
                else:
                    served[t, l, k] = ranks[l, e, turn[t] % copies[l, e]]


@compiled
def serve_token(
    experts: Ints,
    ranks: Ints,
    copies: Ints,
    h: int,
    sent: Ints,
    node_of: Ints,
    used: Longs,
    used_node: Longs,
    stamp: int,
    served: Ints,
) -> None:
    """The policy `local` of docs/metrics.md for one token in one layer, in its three steps.

    Args:
        experts: [K] logical ids, -1 = unused.
        ranks, copies: [E, C], [E] of this layer.
        h: the token's home rank.
        sent: [G] pairs of this layer and batch that h has given to each rank so far, updated.
        node_of: [G] node of each rank.
        used, used_node: [G], [nodes] scratch, smaller than `stamp` everywhere.
        stamp: marks ranks and nodes that serve this token.
        served: [K], written: the rank that serves each pair, -1 = unused.
    """
    top_k = experts.shape[0]
    num_ranks = sent.shape[0]
    used_node[node_of[h]] = stamp
    undecided = 0
    for k in range(top_k):  # steps 1 and 2, which no count sways: the only copy, or one at home
        e = experts[k]
        g = -1
        if e >= 0:
            if copies[e] == 1:
                g = ranks[e, 0]
            else:
                undecided += 1
                for c in range(copies[e]):
                    if ranks[e, c] == h:
                        g = h
                        undecided -= 1
                        break
        served[k] = g
        if g >= 0:
            sent[g] += 1
            used[g] = stamp
            used_node[node_of[g]] = stamp
    if undecided == 0:
        return
    for k in range(top_k):  # step 3: used rank, then touched node, then where h sent least
        e = experts[k]
        if e < 0 or served[k] >= 0:
            continue
        best = -1
        best_tier = 3
        for c in range(copies[e]):
            g = ranks[e, c]
            if used[g] == stamp:
                tier = 0
            elif used_node[node_of[g]] == stamp:
                tier = 1
            else:
                tier = 2
            if (
                tier < best_tier
                or (tier == best_tier and sent[g] < sent[best])
                or (
                    tier == best_tier
                    and sent[g] == sent[best]
                    and (g - h) % num_ranks < (best - h) % num_ranks
                )
            ):
                best = g
                best_tier = tier
        served[k] = best
        sent[best] += 1
        used[best] = stamp
        used_node[node_of[best]] = stamp


@compiled
def serve_local(
    experts: Ints,
    weights: Weights,
    ranks: Ints,
    copies: Ints,
    home: Ints,
    coherent: bool,
    batch: Ints,
    sent: Ints,
    ranks_per_node: int,
    served: Ints,
) -> None:
    """Serve on the home rank first, then where the token goes anyway, then where home sent least.

    Args:
        experts, ranks, copies, served: as in `serve_round_robin`.
        weights: [T, L, K] gate weights; [0, 0, 0] when the trace has none.
        home: [T] rank where each token enters the first layer.
        coherent: whether the home moves to the primary expert's rank after each layer.
        batch: [T] open batch of each token.
        sent: [N, G, L, G] pairs that each home rank has sent so far in each open batch, updated.
        ranks_per_node: ranks of one node.
    """
    num_tokens, num_layers, top_k = experts.shape
    num_ranks = sent.shape[3]
    has_weights = weights.shape[0] > 0
    used = np.zeros(num_ranks, np.int64)
    used_node = np.zeros(num_ranks // ranks_per_node, np.int64)
    node_of = (np.arange(num_ranks) // ranks_per_node).astype(np.int32)
    stamp = 0
    for t in range(num_tokens):
        h = home[t]
        for l in range(num_layers):  # noqa: E741
            stamp += 1
            serve_token(
                experts[t, l],
                ranks[l],
                copies[l],
                h,
                sent[batch[t], h, l],
                node_of,
                used,
                used_node,
                stamp,
                served[t, l],
            )
            if coherent:
                primary = -1
                for k in range(top_k):
                    if experts[t, l, k] < 0:
                        continue
                    if primary < 0 or (has_weights and weights[t, l, k] > weights[t, l, primary]):
                        primary = k
                if primary >= 0:
                    h = served[t, l, primary]

"""The loops of the replay, compiled: which rank serves each pair, and what that costs.

Shape letters: L layers, E experts, G ranks, K experts per token, C copies, N open batches,
J request groups of the batch figures, R request blocks; here T is the tokens of one slice.
Every kernel is O(T L K) (`serve_local`: O(T L K C)), releases the GIL and is cached on disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.compiling import compiled

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float64]
Weights = NDArray[np.float32]

# Columns of the sums per request block, in the order of `placer.cost.replay.SUMS`.
_TOKEN_LAYERS = 0
_SPAN = 1
_MESSAGES_ALLTOALL = 2
_MESSAGES_COHERENT = 3
_NODE_SPAN = 4
_NODE_MESSAGES_ALLTOALL = 5
_NODE_MESSAGES_COHERENT = 6
_PAIRS = 7
_CROSS_RANK_PAIRS = 8
_CROSS_NODE_PAIRS = 9
_TRANSITIONS = 10
_CROSS_RANK_PER_TOKEN = 11
_CROSS_NODE_PER_TOKEN = 12


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
    ranks_per_node: int,
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
        ranks_per_node: ranks of one node.
        used, used_node: [G], [nodes] scratch, smaller than `stamp` everywhere.
        stamp: marks ranks and nodes that serve this token.
        served: [K], written: the rank that serves each pair, -1 = unused.
    """
    top_k = experts.shape[0]
    num_ranks = sent.shape[0]
    used_node[h // ranks_per_node] = stamp
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
            used_node[g // ranks_per_node] = stamp
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
            elif used_node[g // ranks_per_node] == stamp:
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
        used_node[best // ranks_per_node] = stamp


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
                ranks_per_node,
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


@compiled
def count(
    served: Ints,
    weights: Weights,
    home: Ints,
    block: Ints,
    ranks_per_node: int,
    sums: Floats,
    loads: Longs,
    batch: Ints,
    group: Ints,
    batch_loads: Ints,
) -> None:
    """Add what these tokens send and load to the sums of their request blocks and batches.

    Args:
        served: [T, L, K] rank that serves each pair, -1 = unused.
        weights: [T, L, K] gate weights; [0, 0, 0] when the trace has none.
        home: [T] rank where each token enters the first layer.
        block: [T] request block of each token.
        ranks_per_node: ranks of one node.
        sums: [R, len(SUMS)], added to.
        loads: [R, L, G] pairs served, added to.
        batch: [T] open batch of each token.
        group: [T] request group of each token.
        batch_loads: [N, J, L, G] pairs served, added to.
    """
    num_tokens, num_layers, top_k = served.shape
    num_ranks = loads.shape[2]
    num_nodes = num_ranks // ranks_per_node
    node_of = np.arange(num_ranks) // ranks_per_node
    has_weights = weights.shape[0] > 0
    # Row l % 2 holds how often layer l's pairs hit each rank or node; all zeros between tokens.
    times = np.zeros((2, num_ranks), np.int64)
    times_node = np.zeros((2, num_nodes), np.int64)
    for t in range(num_tokens):
        alltoall_home = home[t]
        coherent_home = home[t]
        row = sums[block[t]]
        block_loads = loads[block[t]]
        group_loads = batch_loads[batch[t], group[t]]
        previous_k = 0
        span = 0
        messages = 0
        coherent = 0
        node_span = 0
        node_messages = 0
        node_coherent = 0
        pairs = 0
        cross = 0
        cross_node = 0
        transitions = 0
        cross_weighted = 0.0
        cross_node_weighted = 0.0
        for l in range(num_layers):  # noqa: E741
            now = l & 1
            before = 1 - now
            used_k = 0
            primary = -1
            num_here = 0
            same = 0
            for k in range(top_k):
                g = served[t, l, k]
                if g < 0:
                    continue
                used_k += 1
                block_loads[l, g] += 1
                group_loads[l, g] += 1
                if primary < 0 or (has_weights and weights[t, l, k] > weights[t, l, primary]):
                    primary = k
                num_here += times[now, g] == 0
                times[now, g] += 1
                same += times[before, g]
            num_nodes_here = min(used_k, 1)
            same_node = used_k * previous_k
            if num_nodes > 1:
                num_nodes_here = 0
                same_node = 0
                for k in range(top_k):
                    if served[t, l, k] < 0:
                        continue
                    n = node_of[served[t, l, k]]
                    num_nodes_here += times_node[now, n] == 0
                    times_node[now, n] += 1
                    same_node += times_node[before, n]
            if used_k > 0:
                span += num_here
                messages += num_here - (times[now, alltoall_home] > 0)
                coherent += 2 * num_here - 1 - (times[now, coherent_home] > 0)
                node_span += num_nodes_here
                if num_nodes > 1:
                    at_home = times_node[now, node_of[alltoall_home]] > 0
                    node_messages += num_nodes_here - at_home
                    at_home = times_node[now, node_of[coherent_home]] > 0
                    node_coherent += 2 * num_nodes_here - 1 - at_home
                coherent_home = served[t, l, primary]
            if used_k > 0 and previous_k > 0:
                both = used_k * previous_k
                pairs += both
                cross += both - same
                cross_node += both - same_node
                transitions += 1
                cross_weighted += (both - same) / both
                cross_node_weighted += (both - same_node) / both
            previous_k = used_k
            for k in range(top_k):
                if l > 0 and served[t, l - 1, k] >= 0:
                    times[before, served[t, l - 1, k]] = 0
                    times_node[before, node_of[served[t, l - 1, k]]] = 0
        times[:] = 0
        times_node[:] = 0
        row[_TOKEN_LAYERS] += num_layers
        row[_SPAN] += span
        row[_MESSAGES_ALLTOALL] += messages
        row[_MESSAGES_COHERENT] += coherent
        row[_NODE_SPAN] += node_span
        row[_NODE_MESSAGES_ALLTOALL] += node_messages
        row[_NODE_MESSAGES_COHERENT] += node_coherent
        row[_PAIRS] += pairs
        row[_CROSS_RANK_PAIRS] += cross
        row[_CROSS_NODE_PAIRS] += cross_node
        row[_TRANSITIONS] += transitions
        row[_CROSS_RANK_PER_TOKEN] += cross_weighted
        row[_CROSS_NODE_PER_TOKEN] += cross_node_weighted


@compiled
def transfers(
    served: Ints,
    weights: Weights,
    home: Ints,
    batch: Ints,
    coherent: bool,
    deduplicate: bool,
    ranks_per_node: int,
    dispatch: Ints,
    combine: Ints,
) -> None:
    """Count the hidden states that every rank sends and receives, per batch and layer.

    The last axes of `dispatch` and `combine` are [link, direction, rank]: link 0 inside a node,
    1 between nodes; direction 0 sent, 1 received.

    Args:
        served, weights, home: as in `count`.
        batch: [T] batch of each token, a row of `dispatch` and `combine`.
        coherent: the home moves to the primary's rank, and results are brought there.
        deduplicate: one copy per remote node over the network, to the rank there with the same
            number within its node, which passes it on (and gathers results the same way back).
        ranks_per_node: ranks of one node.
        dispatch, combine: [N, L, 2, 2, G], added to.
    """
    num_tokens, num_layers, top_k = served.shape
    num_ranks = dispatch.shape[4]
    has_weights = weights.shape[0] > 0
    seen = np.zeros(num_ranks, np.int64)
    reached = np.zeros(num_ranks // ranks_per_node, np.int64)
    stamp = 0
    for t in range(num_tokens):
        h = home[t]
        for l in range(num_layers):  # noqa: E741
            primary = -1
            for k in range(top_k):
                if served[t, l, k] >= 0 and (
                    primary < 0 or (has_weights and weights[t, l, k] > weights[t, l, primary])
                ):
                    primary = k
            if primary < 0:
                continue
            gather = served[t, l, primary] if coherent else h
            for way in range(2):
                center = h if way == 0 else gather
                table = dispatch[batch[t], l] if way == 0 else combine[batch[t], l]
                stamp += 1
                for k in range(top_k):
                    g = served[t, l, k]
                    if g < 0 or seen[g] == stamp or g == center:
                        continue
                    seen[g] = stamp
                    node = g // ranks_per_node
                    near = center
                    if node != center // ranks_per_node:
                        if deduplicate:
                            near = node * ranks_per_node + center % ranks_per_node
                        if not deduplicate or reached[node] != stamp:
                            reached[node] = stamp
                            far = near if deduplicate else g
                            table[1, way, center] += 1  # sent on dispatch, received on combine
                            table[1, 1 - way, far] += 1
                        if not deduplicate:
                            continue
                    if near != g:
                        table[0, way, near] += 1
                        table[0, 1 - way, g] += 1
            h = gather


@compiled
def activate(
    experts: Ints, served: Ints, batch: Ints, pairs: Ints, activated: Ints, last: Longs, stamp: int
) -> None:
    """Count the pairs that every rank serves and the distinct experts that they use.

    Args:
        experts, served: [T, L, K].
        batch: [T] batch of each token, non-decreasing.
        pairs: [N, L, G] token-expert pairs, added to.
        activated: [N, L, G] experts of the rank with at least one pair, added to.
        last: [L, E, G] stamp + batch of the last use of each copy, updated.
        stamp: larger than anything in `last`.
    """
    num_tokens, num_layers, top_k = experts.shape
    for t in range(num_tokens):
        b = batch[t]
        for l in range(num_layers):  # noqa: E741
            for k in range(top_k):
                e = experts[t, l, k]
                if e < 0:
                    continue
                g = served[t, l, k]
                pairs[b, l, g] += 1
                if last[l, e, g] != stamp + b:
                    last[l, e, g] = stamp + b
                    activated[b, l, g] += 1

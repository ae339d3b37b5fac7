"""Compiled loops: hidden states that move between ranks, pairs computed and experts used.

Shape letters: L layers, E experts, G ranks, K experts per token, N batches; T is the tokens of one
group of batches. O(T L K), without the GIL.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.compiling import compiled

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float64]
Weights = NDArray[np.float32]


@compiled
def transfers(
    served: Ints,
    weights: Weights,
    home: Ints,
    batch: Ints,
    coherent: bool,
    deduplicate: bool,
    ranks_per_node: int,
    ranks_per_leaf: int,
    dispatch: Ints,
    combine: Ints,
    pairs: Ints,
) -> None:
    """Count the hidden states that every rank sends and receives, per batch and layer.

    The last axes of `dispatch` and `combine` are [link, direction, rank]: link 0 inside a node,
    1 between nodes, 2 the part of these that leaves a leaf, 3 what stays on its rank (the same in
    both directions); direction 0 sent, 1 received.

    Args:
        served: [T, L, K] rank that serves each pair, -1 = unused.
        weights: [T, L, K] gate weights; [0, 0, 0] when the trace has none.
        home: [T] rank where each token enters the first layer.
        batch: [T] batch of each token, a row of `dispatch` and `combine`.
        coherent: the home moves to the primary's rank, and results are brought there.
        deduplicate: one copy per remote node over the network, to the rank there with the same
            number within its node, which passes it on (and gathers results the same way back).
        ranks_per_node, ranks_per_leaf: ranks of one node, and below one leaf.
        dispatch, combine: [N, L, 4, 2, G], added to; with a fixed home the combine mirrors the
            dispatch, and only the latter is counted.
        pairs: [N, L, 2, G, G] states by way (dispatch, combine), sender and receiver, added to,
            likewise; [0, ...] when nobody asks.
    """
    num_tokens, num_layers, top_k = served.shape
    num_ranks = dispatch.shape[4]
    has_weights = weights.shape[0] > 0
    has_pairs = pairs.shape[0] > 0
    seen = np.zeros(num_ranks, np.int64)
    reached = np.zeros(num_ranks // ranks_per_node, np.int64)
    node_of = np.arange(num_ranks) // ranks_per_node
    leaf_of = np.arange(num_ranks) // ranks_per_leaf
    stamp = 0
    ways = 2 if coherent else 1
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
            for way in range(ways):
                center = h if way == 0 else gather
                table = dispatch[batch[t], l] if way == 0 else combine[batch[t], l]
                stamp += 1
                for k in range(top_k):
                    g = served[t, l, k]
                    if g < 0 or seen[g] == stamp:
                        continue
                    seen[g] = stamp
                    if g == center:
                        table[3, 0, g] += 1
                        table[3, 1, g] += 1
                        continue
                    node = node_of[g]
                    near = center
                    if node != node_of[center]:
                        if deduplicate:
                            near = node * ranks_per_node + center % ranks_per_node
                        if not deduplicate or reached[node] != stamp:
                            reached[node] = stamp
                            far = near if deduplicate else g
                            table[1, way, center] += 1  # sent on dispatch, received on combine
                            table[1, 1 - way, far] += 1
                            if leaf_of[far] != leaf_of[center]:
                                table[2, way, center] += 1
                                table[2, 1 - way, far] += 1
                            if has_pairs:
                                source, target = (center, far) if way == 0 else (far, center)
                                pairs[batch[t], l, way, source, target] += 1
                        if not deduplicate:
                            continue
                    if near != g:
                        table[0, way, near] += 1
                        table[0, 1 - way, g] += 1
                        if has_pairs:
                            source, target = (near, g) if way == 0 else (g, near)
                            pairs[batch[t], l, way, source, target] += 1
            h = gather


@compiled
def activate(
    experts: Ints,
    served: Ints,
    batch: Ints,
    pairs: Ints,
    activated: Ints,
    last: Longs,
    stamp: int,
    increments: Floats,
    times: Ints,
    curve_us: Floats,
) -> None:
    """Count the pairs that every rank serves and the distinct experts that they use.

    Args:
        experts, served: [T, L, K].
        batch: [T] batch of each token, non-decreasing.
        pairs: [N, L, G] token-expert pairs, added to.
        activated: [N, L, G] experts of the rank with at least one pair, added to.
        last: [L, E, G] stamp + batch of the last use of each copy, updated.
        stamp: larger than anything in `last`.
        increments: [M] what the first, second, ... pair of an expert adds to its time, the last
            entry also every further one; empty where no such curve is known.
        times: [L, E, G] pairs of each copy in its last batch, updated where there are increments.
        curve_us: [N, L, G] sum over experts of their times, added to.
    """
    num_tokens, num_layers, top_k = experts.shape
    num_increments = increments.shape[0]
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
                    if num_increments > 0:
                        times[l, e, g] = 0
                if num_increments > 0:
                    curve_us[b, l, g] += increments[min(times[l, e, g], num_increments - 1)]
                    times[l, e, g] += 1

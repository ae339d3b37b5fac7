"""Compiled loop: messages, spans, crossings and loads of served pairs, as sums.

Shape letters: L layers, G ranks, K experts per token, N open batches, J request groups of the batch
figures, R request blocks; T is the tokens of one slice. O(T L K), without the GIL.
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

"""The checker's own loop: which copy serves each token-expert pair. No solver uses it."""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled


@compiled
def serve(experts: Any, copies: Any, home: Any, batch: Any, ranks_per_node: int) -> Any:
    """[T, K] rank that serves each pair of one layer, -1 = unused; see `solvers.check`.

    Args:
        experts: [T, K] expert ids, -1 = unused.
        copies: [E, G] whether a rank holds an expert.
        home: [T] home ranks, -1 where nobody knows.
        batch: [T] batch of each token; the counts of a home begin anew with its batch.
        ranks_per_node: ranks of one node.
    """
    num_tokens, width = experts.shape
    num_experts, num_ranks = copies.shape
    num_copies = np.zeros(num_experts, np.int64)
    ranks = np.zeros((num_experts, num_ranks), np.int64)  # of each expert, ascending
    for e in range(num_experts):
        for g in range(num_ranks):
            if copies[e, g]:
                ranks[e, num_copies[e]] = g
                num_copies[e] += 1
    served = np.full((num_tokens, width), -1, np.int64)
    count = np.zeros((num_ranks + 1, num_ranks), np.int64)  # by home; the last row: unknown
    counted = np.full(num_ranks + 1, -1, np.int64)  # the batch that each row counts
    used = np.full(num_ranks, -1, np.int64)  # the last token that used each rank
    touched = np.full(
        num_ranks // ranks_per_node, -1, np.int64
    )  # and each node, or is at home there
    for t in range(num_tokens):
        start = home[t]
        if counted[start] != batch[t]:
            count[start, :] = 0
            counted[start] = batch[t]
        load = count[start]
        if start >= 0:
            touched[start // ranks_per_node] = t
        waiting = 0
        for k in range(width):  # at home, or where the only copy is
            e = experts[t, k]
            if e < 0:
                continue
            if start >= 0 and copies[e, start]:
                rank = start
            elif num_copies[e] == 1:
                rank = ranks[e, 0]
            else:
                waiting += 1
                continue
            served[t, k] = rank
            load[rank] += 1
            used[rank] = t
            touched[rank // ranks_per_node] = t
        if waiting == 0:
            continue
        for k in range(width):  # a used rank, a touched node, any copy: the least counted
            e = experts[t, k]
            if e < 0 or served[t, k] >= 0:
                continue
            best = -1
            best_worth = (np.int64(3), np.int64(0), np.int64(0))
            for j in range(num_copies[e]):
                g = ranks[e, j]
                tier = np.int64(2)
                if used[g] == t:
                    tier = np.int64(0)
                elif touched[g // ranks_per_node] == t:
                    tier = np.int64(1)
                worth = (tier, load[g], np.int64((g - max(start, 0)) % num_ranks))
                if best < 0 or worth < best_worth:
                    best = g
                    best_worth = worth
            served[t, k] = best
            load[best] += 1
            used[best] = t
            touched[best // ranks_per_node] = t
    return served

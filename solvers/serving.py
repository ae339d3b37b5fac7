"""Kernel: what every token of one layer sends, and what ranks serve, by the policy `local`.

Shape letters: G ranks, S slots, T tokens, K experts per token, C scenarios.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled
from solvers.walking import copies_of, serve_token


@compiled
def serve_layer(
    experts: Any,
    slots: Any,
    num_experts: int,
    num_nodes: int,
    home: Any,
    batch: Any,
    scenario: Any,
    workload: Any,
    row_prices: Any,
    load: Any,
    traffic: Any,
) -> None:
    """Serve every token of one layer by the replica policy `local` (docs/metrics.md), and count.

    Args:
        experts: [T, K] expert ids, -1 = unused.
        slots: [S] expert of each slot.
        num_nodes: nodes, of equally many ranks.
        home: [T] home rank of each token, -1 where nobody knows.
        batch: [T] batch of each token; the counts of a home begin anew with its batch.
        scenario, workload: [T] of each token.
        row_prices: [G] or [G + num_nodes] price of a message to each rank, and to each node.
        load: [C, G] float64, filled with the pairs that each rank serves, by scenario.
        traffic: [workloads] float64, filled with the prices of all messages.
    """
    num_ranks = load.shape[1]
    ranks_per_node = num_ranks // num_nodes
    copies, where = copies_of(slots, num_experts, num_ranks)
    load[:] = 0.0
    traffic[:] = 0.0
    sent = np.zeros((num_ranks + 1, num_ranks), np.int64)  # by home; the last row: unknown
    counted = np.full(num_ranks + 1, -1, np.int64)  # the batch that each row counts
    used = np.zeros(num_ranks, np.int64)
    used_node = np.zeros(num_nodes, np.int64)
    served = np.zeros(experts.shape[1], np.int64)
    for token in range(experts.shape[0]):
        stamp = token + 1
        start = home[token]
        if counted[start] != batch[token]:
            sent[start, :] = 0
            counted[start] = batch[token]
        serve_token(
            experts[token], copies, where, start, sent[start], ranks_per_node, used, used_node,
            stamp, served,
        )  # fmt: skip
        for k in range(served.size):
            if served[k] >= 0:
                load[scenario[token], served[k]] += 1.0
        for rank in range(num_ranks):
            if used[rank] == stamp and rank != start:
                traffic[workload[token]] += row_prices[rank]
        if row_prices.size == num_ranks:
            continue
        for node in range(num_nodes):
            if used_node[node] == stamp and (start < 0 or node != start // ranks_per_node):
                traffic[workload[token]] += row_prices[num_ranks + node]

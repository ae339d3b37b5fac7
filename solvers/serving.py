"""Kernel: what every token of one layer sends, and what ranks serve, by the policy `local`.

Shape letters: G ranks, S slots, T tokens, K experts per token, C scenarios.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled, compiled_lean
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
    prices: Any,
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
        prices: [G + 1, G] or [G + 1, G + num_nodes] by home, the last one unknown: price of a
            message to each rank, and to each node.
        load: [C, G] float64, filled with the pairs that each rank serves, by scenario.
        traffic: [workloads] float64, filled with the prices of all messages.
    """
    num_ranks = load.shape[1]
    copies, where = copies_of(slots, num_experts, num_ranks)
    load[:] = 0.0
    traffic[:] = 0.0
    _serve(
        experts, copies, where, num_nodes, home, batch, scenario, workload, prices,
        np.zeros((num_ranks + 1, num_ranks), np.int64), np.full(num_ranks + 1, -1, np.int64),
        np.zeros(num_ranks, np.int64), np.zeros(num_nodes, np.int64),
        np.zeros(experts.shape[1], np.int64), load, traffic,
    )  # fmt: skip


@compiled_lean
def _serve(
    experts: Any, copies: Any, where: Any, num_nodes: int, home: Any, batch: Any, scenario: Any,
    workload: Any, prices: Any, sent: Any, counted: Any, used: Any, used_node: Any,
    served: Any, load: Any, traffic: Any,
) -> None:  # fmt: skip
    """The loop of `serve_layer`.

    Args:
        copies, where: of `copies_of`.
        sent: [G + 1, G] zeros: pairs by home, the last one unknown; counted: [G + 1] their batch.
        used, used_node, served: [G], [N], [K] scratch.
    """
    num_ranks = used.size
    ranks_per_node = num_ranks // num_nodes
    by_node = prices.shape[1] > num_ranks
    for token in range(experts.shape[0]):
        # a stamp marks what a token uses, the next one what it has paid for
        stamp = 2 * token + 1
        start = home[token]
        if counted[start] != batch[token]:
            sent[start, :] = 0
            counted[start] = batch[token]
        serve_token(
            experts[token], copies, where, start, sent[start], ranks_per_node, used, used_node,
            stamp, served,
        )  # fmt: skip
        if start >= 0:  # nothing to pay there
            used[start] = stamp + 1
            used_node[start // ranks_per_node] = stamp + 1
        row_prices = prices[start]
        price = 0.0
        for k in range(served.size):
            rank = served[k]
            if rank < 0:
                continue
            load[scenario[token], rank] += 1.0
            if used[rank] == stamp:
                used[rank] = stamp + 1
                price += row_prices[rank]
            node = rank // ranks_per_node
            if by_node and used_node[node] == stamp:
                used_node[node] = stamp + 1
                price += row_prices[num_ranks + node]
        traffic[workload[token]] += price

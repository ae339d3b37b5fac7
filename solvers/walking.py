"""Kernel: tokens walk through all layers under coherent dispatch and choose their copies.

The replica policy `local` of docs/metrics.md; a token's home in a layer is the rank that served its
primary expert in the layer before. O(T L K C) for C copies.

Shape letters: L layers, E experts, G ranks, N nodes, S slots, T tokens, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled, compiled_lean


@compiled
def copies_of(slots: Any, num_experts: int, num_ranks: int) -> Any:
    """[E] number of copies of one layer's experts, and [E, C] their ranks, -1 beyond."""
    width = slots.size // num_ranks
    count = np.zeros(num_experts, np.int64)
    for slot in range(slots.size):
        if slots[slot] >= 0:
            count[slots[slot]] += 1
    ranks = np.full((num_experts, count.max()), -1, np.int64)
    count[:] = 0
    for slot in range(slots.size):
        expert = slots[slot]
        if expert >= 0:
            ranks[expert, count[expert]] = slot // width
            count[expert] += 1
    return count, ranks


@compiled_lean
def serve_token(
    experts: Any,
    count: Any,
    ranks: Any,
    home: int,
    sent: Any,
    ranks_per_node: int,
    used: Any,
    used_node: Any,
    stamp: int,
    served: Any,
) -> None:
    """Serve one token in one layer.

    Args:
        experts: [K] expert ids, -1 = unused.
        count, ranks: from `copies_of`.
        home: where the token is, -1 where nobody knows.
        sent: [G] pairs that this home has sent to each rank so far in the batch, updated.
        used, used_node: [G], [N] the last stamp that marked each; updated.
        stamp: of this token, larger than all before.
        served: [K] filled with the rank that serves each pair, -1 = unused.
    """
    waiting = False
    for k in range(experts.size):
        expert = experts[k]
        served[k] = -1
        if expert < 0:
            continue
        for i in range(count[expert]):
            rank = ranks[expert, i]
            if rank == home or count[expert] == 1:
                served[k] = rank
                sent[rank] += 1
                used[rank] = stamp
                used_node[rank // ranks_per_node] = stamp
                break
        waiting = waiting or served[k] < 0
    if not waiting:
        return
    for k in range(experts.size):
        expert = experts[k]
        if expert < 0 or served[k] >= 0:
            continue
        best = np.int64(-1)
        best_tier = np.int64(3)
        best_turn = np.int64(0)
        for i in range(count[expert]):
            rank = ranks[expert, i]
            node = rank // ranks_per_node
            turn = np.int64((rank - max(home, 0)) % sent.size)
            tier = np.int64(2)
            if used[rank] == stamp:
                tier = np.int64(0)
            elif used_node[node] == stamp or (home >= 0 and node == home // ranks_per_node):
                tier = np.int64(1)
            fewer = best < 0 or sent[rank] < sent[best]
            fewer = fewer or (sent[rank] == sent[best] and turn < best_turn)
            if tier < best_tier or (tier == best_tier and fewer):
                best = rank
                best_tier = tier
                best_turn = turn
        served[k] = best
        sent[best] += 1
        used[best] = stamp
        used_node[best // ranks_per_node] = stamp


@compiled
def walk_tokens(
    tokens: Any,
    primary: Any,
    count: Any,
    ranks: Any,
    start: Any,
    batch: Any,
    scenario: Any,
    workload: Any,
    row_prices: Any,
    ranks_per_node: int,
    load: Any,
    traffic: Any,
    homes: Any,
) -> None:
    """Walk every token through all layers, and count.

    A message to a rank costs what its row costs; a token that a layer serves pays for the ranks
    that it goes to, and for all of them but the primary's to come back.

    Args:
        tokens: [T, L, K] expert ids, -1 = unused.
        primary: [T, L] column of the primary expert, -1 = none.
        count, ranks: [L, E], [L, E, C] from `copies_of`.
        start: [T] home rank on entering the first layer, -1 where nobody knows.
        batch: [T] batch of each token; the counts of a home begin anew with its batch.
        scenario, workload: [T] of each token.
        row_prices: [G] or [G + N] price of a message to each rank, and to each node.
        load: [C, L, G] float64, filled with the pairs that each rank serves, by scenario.
        traffic: [workloads] float64, filled with the prices of all messages.
        homes: [L, T] int16, filled with the home rank of each token on entering each layer.
    """
    num_tokens, num_layers, top_k = tokens.shape
    num_ranks = load.shape[2]
    num_nodes = num_ranks // ranks_per_node
    nodes_count = row_prices.size > num_ranks
    load[:] = 0.0
    traffic[:] = 0.0
    sent = np.zeros((num_ranks + 1, num_layers, num_ranks), np.int32)  # last row: unknown home
    counted = np.full((num_ranks + 1, num_layers), -1, np.int64)  # batch that each row counts
    used = np.zeros(num_ranks, np.int64)
    used_node = np.zeros(num_nodes, np.int64)
    served = np.zeros(top_k, np.int64)
    stamp = 0
    for token in range(num_tokens):
        home = np.int64(start[token])
        paid = 0.0
        for layer in range(num_layers):
            stamp += 1
            homes[layer, token] = home
            if counted[home, layer] != batch[token]:
                sent[home, layer, :] = 0
                counted[home, layer] = batch[token]
            serve_token(
                tokens[token, layer], count[layer], ranks[layer], home, sent[home, layer],
                ranks_per_node, used, used_node, stamp, served,
            )  # fmt: skip
            after = home
            first = np.int64(-1)
            for k in range(top_k):
                if served[k] >= 0:
                    load[scenario[token], layer, served[k]] += 1.0
                    if first < 0:
                        first = served[k]
            if primary[token, layer] >= 0:
                after = served[primary[token, layer]]
                first = after
            for rank in range(num_ranks):
                if used[rank] == stamp:
                    there = 1.0 - 1.0 / num_ranks if home < 0 else 1.0 * (rank != home)
                    paid += row_prices[rank] * (there + (rank != first))
            if nodes_count:
                first_node = first // ranks_per_node
                for node in range(num_nodes):
                    if used_node[node] == stamp:
                        there = 1.0 - 1.0 / num_nodes
                        if home >= 0:
                            there = 1.0 * (node != home // ranks_per_node)
                        paid += row_prices[num_ranks + node] * (there + (node != first_node))
            home = after if after >= 0 else np.int64(0)
        traffic[workload[token]] += paid

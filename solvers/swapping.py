"""Kernel: simulated annealing by swaps on what pairs of experts are worth on one rank.

A table says what each expert would keep on each rank: of co-activation with its own layer, of flow
with the layers before and after. A proposed swap is priced from four entries of it, an accepted one
updates the table along the rows of its two experts.

Shape letters: L layers, N slots and experts (spare slots hold experts of no weight), G ranks.
Complexity: O(1) a proposal, O(G) with a price of load; O(N) an accepted one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.anneal import below, seeded, uniform
from solvers.compiling import compiled


@compiled
def fill_table(ranks: Any, together: Any, flow: Any, table: Any) -> None:
    """table [L, N, G] of a placement: what each expert keeps on each rank."""
    num_layers, num_experts = ranks.shape
    table[:] = 0.0
    for layer in range(num_layers):
        for i in range(num_experts):
            for j in range(num_experts):
                if together.shape[0] > 0 and i != j:
                    table[layer, i, ranks[layer, j]] += together[layer, i, j]
                if flow.shape[0] > 0 and layer + 1 < num_layers:
                    table[layer, i, ranks[layer + 1, j]] += flow[layer, i, j]
                    table[layer + 1, j, ranks[layer, i]] += flow[layer, i, j]


@compiled
def anneal_swaps(
    ranks: Any, together: Any, flow: Any, relative: Any, fair: Any, price: float,
    hot: float, cold: float, proposals: int, seed: int, table: Any,
) -> None:  # fmt: skip
    """Anneal a placement in place; it ends cold, not at the best state that was seen.

    Maximises sum over co-activated pairs and flow within ranks - price x sum over layers of the
    largest rank load.

    Args:
        ranks: [L, N] rank of each expert; swaps keep how many each rank holds.
        together: [L, N, N] symmetric, or [0, N, N] if it does not count.
        flow: [L-1, N, N], or [0, N, N] if it does not count.
        relative: [L, N] load in units of the mean rank load.
        fair: [G] load that is fair for each rank's speed, in the same units.
        price: of one unit of the largest rank load.
        hot, cold: first and last temperature.
        proposals: how many swaps to propose.
        seed: of the random numbers.
        table: [L, N, G] scratch.
    """
    num_layers, num_experts = ranks.shape
    num_ranks = table.shape[2]
    if num_ranks < 2 or num_experts < 2:
        return
    fill_table(ranks, together, flow, table)
    rank_load = np.zeros((num_layers, num_ranks))
    for layer in range(num_layers):
        for expert in range(num_experts):
            rank_load[layer, ranks[layer, expert]] += relative[layer, expert]
    state = seeded(seed)
    cooling = (cold / hot) ** (1.0 / max(1, proposals))
    temperature = hot
    for _ in range(proposals):
        temperature *= cooling
        layer = below(state, num_layers)
        i, j = below(state, num_experts), below(state, num_experts)
        a, b = ranks[layer, i], ranks[layer, j]
        if a == b:
            continue
        row_i, row_j = table[layer, i], table[layer, j]
        gain = row_i[b] - row_i[a] + row_j[a] - row_j[b]
        if together.shape[0] > 0:
            gain -= 2.0 * together[layer, i, j]
        moved = relative[layer, j] - relative[layer, i]
        if price > 0.0:
            load = rank_load[layer]
            before = 0.0
            after = max((load[a] + moved) / fair[a], (load[b] - moved) / fair[b])
            for rank in range(num_ranks):
                share = load[rank] / fair[rank]
                before = max(before, share)
                if rank != a and rank != b:
                    after = max(after, share)
            gain -= price * (after - before)
        if gain < 0.0 and gain < temperature * np.log(uniform(state) + 1e-300):
            continue
        ranks[layer, i], ranks[layer, j] = b, a
        rank_load[layer, a] += moved
        rank_load[layer, b] -= moved
        if together.shape[0] > 0:
            for other in range(num_experts):
                difference = together[layer, i, other] - together[layer, j, other]
                if other != i:
                    change = difference if other != j else together[layer, i, j]
                    table[layer, other, a] -= change
                    table[layer, other, b] += change
            # of i itself only j has moved; the loop left it out
            table[layer, i, a] += together[layer, i, j]
            table[layer, i, b] -= together[layer, i, j]
        if flow.shape[0] > 0:
            if layer + 1 < num_layers:
                for other in range(num_experts):
                    change = flow[layer, i, other] - flow[layer, j, other]
                    table[layer + 1, other, a] -= change
                    table[layer + 1, other, b] += change
            if layer > 0:
                for other in range(num_experts):
                    change = flow[layer - 1, other, i] - flow[layer - 1, other, j]
                    table[layer - 1, other, a] -= change
                    table[layer - 1, other, b] += change

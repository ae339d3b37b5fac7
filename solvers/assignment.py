"""Kernel: the transport problem of one layer, experts to ranks.

    maximise sum_i profit[i, g(i)] over all g with at most capacity[g] experts on rank g

Rows enter one by one along a shortest augmenting path; the path runs over the G ranks instead of
the E experts (rank g to rank h costs what the cheapest move of one of g's experts to h costs), so
that equal slots of a rank are not copies of a column, whose ties slow a general assignment solver
down. Exact. O(E (G^2 x passes + slots G)); passes is small in practice, at most G.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled

_EPSILON = 1e-12  # relative to the largest profit: below it a detour is rounding, not gain


def _assign(profit: Any, capacity: Any) -> Any:
    num_rows, num_ranks = profit.shape
    tolerance = _EPSILON * max(1e-300, np.abs(profit).max())
    assigned = np.full(num_rows, -1, np.int64)
    used = np.zeros(num_ranks, np.int64)
    move_cost = np.full((num_ranks, num_ranks), np.inf)  # of one expert of a rank to another rank
    mover = np.full((num_ranks, num_ranks), -1, np.int64)
    distance = np.empty(num_ranks)
    parent = np.empty(num_ranks, np.int64)
    for row in range(num_rows):
        for rank in range(num_ranks):
            distance[rank] = -profit[row, rank]
            parent[rank] = -1
        for _ in range(num_ranks):
            shorter = False
            for source in range(num_ranks):
                if used[source] == 0:
                    continue
                for rank in range(num_ranks):
                    through = distance[source] + move_cost[source, rank]
                    if through < distance[rank] - tolerance:
                        distance[rank] = through
                        parent[rank] = source
                        shorter = True
            if not shorter:
                break
        end = -1
        for rank in range(num_ranks):
            free = used[rank] < capacity[rank]
            if free and (end < 0 or distance[rank] < distance[end]):
                end = rank
        used[end] += 1
        rank = end
        for _ in range(num_ranks):
            source = parent[rank]
            if source < 0:
                break
            assigned[mover[source, rank]] = rank
            rank = source
        assigned[row] = rank
        rank = end
        while rank >= 0:  # the moves from every rank of the path have changed
            source = parent[rank]
            for other in range(num_ranks):
                move_cost[rank, other] = np.inf
            for moved in range(row + 1):
                if assigned[moved] == rank:
                    for other in range(num_ranks):
                        cost = profit[moved, rank] - profit[moved, other]
                        if other != rank and cost < move_cost[rank, other]:
                            move_cost[rank, other] = cost
                            mover[rank, other] = moved
            rank = source
    return assigned


def _layer_profit(before: Any, ranks_before: Any, after: Any, ranks_after: Any, profit: Any) -> Any:
    profit[:] = 0.0
    for other in range(before.shape[0]):
        rank = ranks_before[other]
        for expert in range(before.shape[1]):
            profit[expert, rank] += before[other, expert]
    for expert in range(after.shape[0]):
        for other in range(after.shape[1]):
            profit[expert, ranks_after[other]] += after[expert, other]


def _flow_between_ranks(flow: Any, first: Any, second: Any, num_ranks: Any) -> Any:
    total = np.zeros((num_ranks, num_ranks))
    for i in range(flow.shape[0]):
        for j in range(flow.shape[1]):
            total[first[i], second[j]] += flow[i, j]
    return total


def _match_partitions(
    flow: Any, firsts: Any, seconds: Any, value: Any, sizes: Any, forbidden: Any
) -> Any:
    num_ranks = sizes.size
    num_firsts, num_seconds = firsts.shape[0], seconds.shape[0]
    best = np.full(num_seconds, -np.inf)
    argument = np.zeros(num_seconds, np.int64)
    ones = np.ones(num_ranks, np.int64)
    row_flow = np.empty((num_ranks, flow.shape[1]))
    total = np.empty((num_ranks, num_ranks))
    for i in range(num_firsts):
        row_flow[:] = 0.0
        for expert in range(flow.shape[0]):
            row_flow[firsts[i, expert]] += flow[expert]
        for j in range(num_seconds):
            total[:] = 0.0
            for expert in range(flow.shape[1]):
                for rank in range(num_ranks):
                    total[rank, seconds[j, expert]] += row_flow[rank, expert]
            ceiling = value[i]
            for rank in range(num_ranks):
                ceiling += total[rank].max()
            if ceiling <= best[j]:
                continue
            for first in range(num_ranks):
                for second in range(num_ranks):
                    if sizes[first] != sizes[second]:
                        total[first, second] = -forbidden
            match = assign(total, ones)
            kept = value[i]
            for rank in range(num_ranks):
                kept += total[rank, match[rank]]
            if kept > best[j]:
                best[j] = kept
                argument[j] = i
    return best, argument


assign = compiled(_assign)
layer_profit = compiled(_layer_profit)
flow_between_ranks = compiled(_flow_between_ranks)
match_partitions = compiled(_match_partitions)

"""Kernels of `solvers.bounds.columns`: the least reduced cost of a rank's set of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled


@compiled
def costs(sets: Any, ranks: Any, first: Any, users: Any, home: Any, weight: Any) -> Any:
    """[M] tokens that use sets [M, s] of experts and whose home is not the rank [M]."""
    seen = np.zeros(weight.size, np.int64)
    found = np.zeros(len(sets), np.float64)
    for m in range(len(sets)):
        for expert in sets[m]:
            for at in range(first[expert], first[expert + 1]):
                token = users[at]
                if seen[token] != m + 1:
                    seen[token] = m + 1
                    if home[token] != ranks[m]:
                        found[m] += weight[token]
    return found


@compiled
def busiest(share: Any, floor: Any, experts: Any) -> Any:
    """Imbalance that a rank alone makes if it holds the `experts`, see `columns.RankLoads`."""
    total = 0.0
    for scenario in range(floor.size):
        load = 0.0
        for expert in experts:
            load += share[scenario, expert]
        total += max(load, floor[scenario])
    return total


@compiled
def descend(
    chosen: Any, rank: Any, price: Any, first: Any, users: Any, home: Any, weight: Any,
    share: Any, floor: Any, most: Any,
) -> Any:  # fmt: skip
    """Swap experts of the set `chosen` [s] in place while its cost less prices falls.

    The set stays one that makes no more imbalance than `most`.
    """
    num_experts = price.size
    trial = chosen.copy()
    used = np.zeros(weight.size, np.int64)
    inside = np.zeros(num_experts, np.bool_)
    for expert in chosen:
        inside[expert] = True
        for at in range(first[expert], first[expert + 1]):
            used[users[at]] += 1
    while True:
        best, best_out, best_in = -1e-6, -1, -1
        for out in range(chosen.size):
            left = price[chosen[out]]
            for at in range(first[chosen[out]], first[chosen[out] + 1]):
                token = users[at]
                used[token] -= 1
                if used[token] == 0 and home[token] != rank:
                    left -= weight[token]
            for expert in range(num_experts):
                if inside[expert]:
                    continue
                change = left - price[expert]
                for at in range(first[expert], first[expert + 1]):
                    token = users[at]
                    if used[token] == 0 and home[token] != rank:
                        change += weight[token]
                if change < best:
                    trial[out] = expert
                    if busiest(share, floor, trial) <= most:
                        best, best_out, best_in = change, out, expert
                    trial[out] = chosen[out]
            for at in range(first[chosen[out]], first[chosen[out] + 1]):
                used[users[at]] += 1
        if best_out < 0:
            return
        for at in range(first[chosen[best_out]], first[chosen[best_out] + 1]):
            used[users[at]] -= 1
        for at in range(first[best_in], first[best_in + 1]):
            used[users[at]] += 1
        inside[chosen[best_out]] = False
        inside[best_in] = True
        chosen[best_out] = best_in
        trial[best_out] = best_in


@compiled
def cheapest_set(
    order: Any, price: Any, rank_price: Any, experts: Any, home: Any, weight: Any, first: Any,
    users: Any, pairs: Any, at_home: Any, share: Any, floor: Any, most: Any, size: Any, limit: Any,
    max_work: Any, stop: Any, found: Any, found_rank: Any,
) -> Any:  # fmt: skip
    """Branch and bound over the sets of `size` experts, and ranks, for the least reduced cost.

    Of tokens that no chosen expert covers, let c_i be those that use expert i and are not at home,
    o_ij those that use both i and j. By Bonferroni's inequality r more experts B cover at least
    sum c_i - sum o_ij over the pairs of B, and so at least the sum of the r smallest
    c_i - (the r - 1 largest o_ij) / 2. All figures are multiples of a power of two and far below
    2^53 of them: the arithmetic is exact. Sets that make more imbalance than `most` are left out.

    Args:
        order: [E] experts in the order in which they are chosen.
        price: [E], rank_price: [Q] what an expert and a rank take off the cost.
        experts, home, weight, first, users: of `TokenSets`.
        pairs: [E, E] tokens that use both, its diagonal those that use one.
        at_home: [Q, E] tokens that use an expert and whose home is the rank.
        share, floor: of `columns.RankLoads`; most: imbalance that one rank may make.
        limit: only less than this is looked for.
        max_work: pairs of candidates to look at before giving up.
        stop: [1] not 0 when to give up.
        found: [F, size], found_rank: [F] filled with sets in the order in which they are found.

    Returns:
        min(limit, least reduced cost), sets found, whether the search was completed, and the pairs
        of candidates that it looked at.
    """
    num_scenarios = floor.size
    lightest = np.zeros((num_scenarios, size + 1))  # load of that many coolest experts
    for scenario in range(num_scenarios):
        coolest = np.sort(share[scenario])
        for z in range(size):
            lightest[scenario, z + 1] = lightest[scenario, z] + coolest[z]
    load = np.zeros((size + 1, num_scenarios))
    num_experts, num_ranks, width = price.size, rank_price.size, experts.shape[1]
    away = np.zeros((size + 1, num_experts))
    homes = np.zeros((size + 1, num_ranks, num_experts))
    both = np.zeros((size + 1, num_experts, num_experts))
    for i in range(num_experts):
        away[0, i] = pairs[i, i]
    both[0] = pairs
    homes[0] = at_home
    covered = np.zeros(weight.size, np.int64)
    candidates = np.zeros((size + 1, num_experts), np.int64)
    count = np.zeros(size + 1, np.int64)
    at = np.zeros(size + 1, np.int64)
    cost = np.zeros((size + 1, num_ranks))
    chosen = np.zeros(size, np.int64)
    candidates[0] = order
    count[0] = num_experts
    cost[0] = -rank_price
    saved = np.zeros(num_experts)
    least = np.zeros(num_experts)
    kept = np.zeros(num_experts, np.bool_)
    top = np.zeros(size + 1)
    best, work, nodes, num_found, depth = limit, 0, 0, 0, 0
    while depth >= 0:
        if at[depth] > count[depth] - (size - depth):
            depth -= 1
            if depth >= 0:
                for q in range(first[chosen[depth]], first[chosen[depth] + 1]):
                    covered[users[q]] -= 1
            continue
        expert = candidates[depth, at[depth]]
        at[depth] += 1
        nodes += 1
        if work > max_work or (nodes & 31 == 0 and stop[0] != 0):
            return best, num_found, False, work
        left = size - depth - 1
        total = 0.0
        for scenario in range(num_scenarios):
            load[depth + 1, scenario] = load[depth, scenario] + share[scenario, expert]
            total += max(load[depth + 1, scenario] + lightest[scenario, left], floor[scenario])
        if total > most:
            continue
        chosen[depth] = expert
        for rank in range(num_ranks):
            cost[depth + 1, rank] = (
                cost[depth, rank] + away[depth, expert] - homes[depth, rank, expert] - price[expert]
            )
        if left == 0:
            work += num_ranks
            for rank in range(num_ranks):
                if cost[depth + 1, rank] < best:
                    best = cost[depth + 1, rank]
                    if num_found < len(found):
                        found[num_found] = chosen
                        found_rank[num_found] = rank
                        num_found += 1
            continue
        start, end = at[depth], count[depth]
        work += (end - start) * (end - start)
        for p in range(start, end):
            i = candidates[depth, p]
            for z in range(left - 1):
                top[z] = 0.0
            if left > 1:
                row, last, worst = both[depth, i], left - 2, 0.0
                for q in range(start, end):
                    value = row[candidates[depth, q]]
                    if value <= worst or q == p:
                        continue
                    z = last
                    while z > 0 and top[z - 1] < value:
                        top[z] = top[z - 1]
                        z -= 1
                    top[z] = value
                    worst = top[last]
            total = 0.0
            for z in range(left - 1):
                total += top[z]
            saved[i] = away[depth, i] - both[depth, expert, i] - price[i] - 0.5 * total
            kept[i] = False
        open_ = False
        for rank in range(num_ranks):
            for z in range(left):
                top[z] = np.inf
            for p in range(start, end):
                i = candidates[depth, p]
                value = saved[i] - homes[depth, rank, i]
                least[i] = value
                if value < top[left - 1]:
                    z = left - 1
                    while z > 0 and top[z - 1] > value:
                        top[z] = top[z - 1]
                        z -= 1
                    top[z] = value
            bound = cost[depth + 1, rank]
            for z in range(left):
                bound += top[z]
            if bound >= best:
                continue
            open_ = True
            for p in range(start, end):
                i = candidates[depth, p]
                if bound + max(0.0, least[i] - top[left - 1]) < best:
                    kept[i] = True
        if not open_:
            continue
        m = 0
        for p in range(start, end):
            i = candidates[depth, p]
            if kept[i]:
                candidates[depth + 1, m] = i
                m += 1
        if m < left:
            continue
        for p in range(m):
            i = candidates[depth + 1, p]
            away[depth + 1, i] = away[depth, i] - both[depth, expert, i]
            for rank in range(num_ranks):
                homes[depth + 1, rank, i] = homes[depth, rank, i]
            if left == 1:
                continue
            row, copied = both[depth, i], both[depth + 1, i]
            for q in range(m):
                j = candidates[depth + 1, q]
                copied[j] = row[j]
        for q in range(first[expert], first[expert + 1]):
            token = users[q]
            covered[token] += 1
            if covered[token] > 1:
                continue
            rank = home[token]
            for a in range(width):
                i = experts[token, a]
                if i < 0:
                    break
                if rank >= 0:
                    homes[depth + 1, rank, i] -= weight[token]
                if left == 1:
                    continue  # the last choice asks for no pairs
                for b in range(a + 1, width):
                    j = experts[token, b]
                    if j < 0:
                        break
                    both[depth + 1, i, j] -= weight[token]
                    both[depth + 1, j, i] -= weight[token]
        count[depth + 1] = m
        at[depth + 1] = 0
        depth += 1
    return best, num_found, True, work

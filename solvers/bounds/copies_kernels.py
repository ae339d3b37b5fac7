"""Kernels of `solvers.bounds.copies`: what sets of experts cost a rank, and the least of it.

Shape letters: N kinds of tokens, K experts of each, Q ranks that differ, s experts of a set. All
figures are integers, UNIT is one message, so that the arithmetic is exact. A set holds an expert
alone (mode 0) or as one of several copies (mode 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled

UNIT = 1024


@compiled
def least_sets(
    order: Any, price: Any, weight: Any, experts: Any, pay: Any, first: Any, users: Any,
    user_pay: Any, home_first: Any, home_rank: Any, home_weight: Any, size: Any,
    most_shared: Any, slack: Any, max_work: Any, stop: Any, best: Any, sets: Any, modes: Any,
) -> Any:  # fmt: skip
    """Branch and bound over the sets of `size` experts and their modes, for every rank at once.

    Let r be what is left to pay of a token's message after the chosen experts, and c_i = min(r,
    what expert i pays). More experts B pay min(r, sum of c_i). That is at least the sum of c_i less
    o_ij = min(c_i, c_j) over the pairs of B: with the c_i in falling order, the pairs of each but
    the first take off c_i or more (where all pay 1, Bonferroni's inequality). Each expert of a pair
    bears a part of o_ij; so m experts cost at least the m smallest of c_i less the m - 1 largest
    parts of i. Two copies, or two experts alone, bear half each; of an expert alone and a copy the
    latter bears as much as if both were copies, the former the rest. No o_ij grows as r falls.

    Args:
        order: [E] experts in the order in which they are chosen.
        price: [2, E] what an expert takes off the cost in each mode.
        weight: [N] tokens; experts: [N, K], -1 = unused ones last.
        pay: [N, K] what a shared expert pays of a message; one alone pays all of it.
        first, users: [E + 1] and numbers of the tokens that use each expert; user_pay: what it pays
            of each of them as a copy.
        home_first: [N + 1] where the homes of each begin in home_rank, home_weight.
        most_shared: copies that a set may hold.
        slack: sets that are less than this below the best known are not looked for.
        max_work: steps before giving up.
        stop: [1] not 0 when to give up.
        best: [Q] least cost less prices that is known; lowered in place.
        sets, modes: [Q, size] the sets that reach it.

    Returns:
        Whether the search was completed: no set is below best - slack; and its steps.
    """
    num_experts, width, num_ranks = order.size, experts.shape[1], best.size
    alone = np.zeros((size + 1, num_experts), np.int64)
    shared = np.zeros((size + 1, num_experts), np.int64)
    home_alone = np.zeros((size + 1, num_ranks, num_experts), np.int64)
    home_shared = np.zeros((size + 1, num_ranks, num_experts), np.int64)
    both = np.zeros((size + 1, num_experts, num_experts), np.int64)  # both alone
    mixed = np.zeros((size + 1, num_experts, num_experts), np.int64)  # row alone, column shared
    least = np.zeros((size + 1, num_experts, num_experts), np.int64)  # min(c_i, c_j)
    pair = np.zeros((size + 1, num_experts, num_experts), np.int64)  # max(0, c_i + c_j - r)
    for n in range(weight.size):
        for a in range(width):
            i = experts[n, a]
            if i < 0:
                break
            alone[0, i] += weight[n] * UNIT
            shared[0, i] += weight[n] * pay[n, a]
            for q in range(home_first[n], home_first[n + 1]):
                home_alone[0, home_rank[q], i] += home_weight[q] * UNIT
                home_shared[0, home_rank[q], i] += home_weight[q] * pay[n, a]
            for b in range(width):
                j = experts[n, b]
                if j < 0:
                    break
                if a == b:
                    continue
                both[0, i, j] += weight[n] * UNIT
                mixed[0, i, j] += weight[n] * pay[n, b]
                least[0, i, j] += weight[n] * min(pay[n, a], pay[n, b])
                pair[0, i, j] += weight[n] * max(0, pay[n, a] + pay[n, b] - UNIT)
    left_of = np.full(weight.size, UNIT, np.int64)
    longest = 0
    for e in range(num_experts):
        longest = max(longest, first[e + 1] - first[e])
    saved = np.zeros((size, longest), np.int64)
    candidates = np.zeros((size + 1, num_experts), np.int64)
    allowed = np.zeros((size + 1, num_experts), np.int64)
    count = np.zeros(size + 1, np.int64)
    at = np.zeros(size + 1, np.int64)
    cost = np.zeros((size + 1, num_ranks), np.int64)
    chosen = np.zeros(size, np.int64)
    mode_of = np.zeros(size, np.int64)
    active = np.zeros(num_experts, np.int64)
    candidates[0] = order
    allowed[0] = 3 if most_shared > 0 else 1
    count[0] = num_experts
    overlaps = np.zeros(num_experts, np.int64)
    num_shared = np.zeros(size + 1, np.int64)
    value = np.zeros((2, num_experts), np.int64)
    worth = np.zeros((num_experts, 2), np.int64)
    top = np.zeros(size + 1, np.int64)
    most = np.iinfo(np.int64).max // 4
    work, nodes, depth = 0, 0, 0
    while depth >= 0:
        if at[depth] >= 2 * (count[depth] - (size - depth) + 1):
            depth -= 1
            if depth >= 0:
                e = chosen[depth]
                for q in range(first[e], first[e + 1]):
                    left_of[users[q]] = saved[depth, q - first[e]]
            continue
        position, mode = at[depth] >> 1, at[depth] & 1
        at[depth] += 1
        if not allowed[depth, position] >> mode & 1:
            continue
        e = candidates[depth, position]
        nodes += 1
        if work > max_work or (nodes & 31 == 0 and stop[0] != 0):
            return False, work
        left = size - depth - 1
        chosen[depth], mode_of[depth] = e, mode
        for g in range(num_ranks):
            if mode == 0:
                paid = alone[depth, e] - home_alone[depth, g, e]
            else:
                paid = shared[depth, e] - home_shared[depth, g, e]
            cost[depth + 1, g] = cost[depth, g] + paid - price[mode, e]
        if left == 0:
            for g in range(num_ranks):
                if cost[depth + 1, g] < best[g]:
                    best[g] = cost[depth + 1, g]
                    sets[g] = chosen
                    modes[g] = mode_of
            continue
        num_shared[depth + 1] = num_shared[depth] + mode
        may = 1 if num_shared[depth + 1] >= most_shared else 3
        start, end = position + 1, count[depth]
        work += (end - start) * (end - start)
        # what each candidate may add at least, twice: its cost less half of its overlaps
        for p in range(start, end):
            i = candidates[depth, p]
            for m in range(2):
                if not (allowed[depth, p] & may) >> m & 1:
                    continue
                for z in range(left - 1):
                    top[z] = 0
                if left > 1:
                    worst = 0
                    for q in range(start, end):
                        if q == p:
                            continue
                        j = candidates[depth, q]
                        overlap = 0
                        if m == 0:
                            if allowed[depth, q] & 1:
                                overlap = both[depth, i, j]
                            if allowed[depth, q] & 2:
                                overlap = max(overlap, 2 * mixed[depth, i, j] - least[depth, i, j])
                        else:
                            overlap = least[depth, i, j]
                        if overlap <= worst:
                            continue
                        z = left - 2
                        while z > 0 and top[z - 1] < overlap:
                            top[z] = top[z - 1]
                            z -= 1
                        top[z] = overlap
                        worst = top[left - 2]
                total = 0
                for z in range(left - 1):
                    total += top[z]
                # the cost after e is at least that before, less what both pay
                if m == 0:
                    if mode == 0:
                        paid = alone[depth, i] - both[depth, e, i]
                    else:
                        paid = alone[depth, i] - mixed[depth, i, e]
                else:
                    if mode == 0:
                        paid = shared[depth, i] - mixed[depth, e, i]
                    else:
                        paid = shared[depth, i] - pair[depth, e, i]
                if m == 0:
                    overlaps[i] = total
                value[m, i] = 2 * (paid - price[m, i]) - total
        open_ = False
        for p in range(start, end):
            allowed[depth + 1, p] = 0
        for g in range(num_ranks):
            for z in range(left):
                top[z] = most
            for p in range(start, end):
                i = candidates[depth, p]
                lowest = most
                for m in range(2):
                    worth[i, m] = most
                    if not (allowed[depth, p] & may) >> m & 1:
                        continue
                    if m == 0:
                        worth[i, 0] = value[0, i] - 2 * home_alone[depth, g, i]
                    else:
                        worth[i, 1] = value[1, i] - 2 * home_shared[depth, g, i]
                    lowest = min(lowest, worth[i, m])
                if lowest < top[left - 1]:
                    z = left - 1
                    while z > 0 and top[z - 1] > lowest:
                        top[z] = top[z - 1]
                        z -= 1
                    top[z] = lowest
            if top[left - 1] == most:
                continue
            bound, limit = 2 * cost[depth + 1, g], 2 * (best[g] - slack)
            for z in range(left):
                bound += top[z]
            if bound >= limit:
                continue
            open_ = True
            for p in range(start, end):
                i = candidates[depth, p]
                for m in range(2):
                    if worth[i, m] < most and bound + max(0, worth[i, m] - top[left - 1]) < limit:
                        allowed[depth + 1, p] |= 1 << m
        if not open_:
            continue
        m = 0
        for p in range(start, end):
            if allowed[depth + 1, p]:
                i, kept = candidates[depth, p], allowed[depth + 1, p]
                z = m  # those that overlap most first
                while z > 0 and overlaps[candidates[depth + 1, z - 1]] < overlaps[i]:
                    candidates[depth + 1, z] = candidates[depth + 1, z - 1]
                    allowed[depth + 1, z] = allowed[depth + 1, z - 1]
                    z -= 1
                candidates[depth + 1, z], allowed[depth + 1, z] = i, kept
                m += 1
        if m < left:
            continue
        for p in range(m):
            i = candidates[depth + 1, p]
            active[i] = nodes
            alone[depth + 1, i] = alone[depth, i]
            shared[depth + 1, i] = shared[depth, i]
            for g in range(num_ranks):
                home_alone[depth + 1, g, i] = home_alone[depth, g, i]
                home_shared[depth + 1, g, i] = home_shared[depth, g, i]
            if left == 1:
                continue
            for q in range(m):
                j = candidates[depth + 1, q]
                both[depth + 1, i, j] = both[depth, i, j]
                mixed[depth + 1, i, j] = mixed[depth, i, j]
                least[depth + 1, i, j] = least[depth, i, j]
                pair[depth + 1, i, j] = pair[depth, i, j]
        work += m * m // 2 + (first[e + 1] - first[e])
        for q in range(first[e], first[e + 1]):
            n = users[q]
            old = left_of[n]
            saved[depth, q - first[e]] = old
            if old == 0:
                continue
            new = 0
            if mode == 1:
                new = max(0, old - user_pay[q])
                if new == old:
                    continue
            left_of[n] = new
            for a in range(width):
                i = experts[n, a]
                if i < 0:
                    break
                if active[i] != nodes:
                    continue
                less = min(pay[n, a], old) - min(pay[n, a], new)
                alone[depth + 1, i] -= weight[n] * (old - new)
                shared[depth + 1, i] -= weight[n] * less
                for z in range(home_first[n], home_first[n + 1]):
                    home_alone[depth + 1, home_rank[z], i] -= home_weight[z] * (old - new)
                    home_shared[depth + 1, home_rank[z], i] -= home_weight[z] * less
                if left == 1:
                    continue
                for b in range(width):
                    j = experts[n, b]
                    if j < 0:
                        break
                    if a == b or active[j] != nodes:
                        continue
                    both[depth + 1, i, j] -= weight[n] * (old - new)
                    mixed[depth + 1, i, j] -= weight[n] * (
                        min(pay[n, b], old) - min(pay[n, b], new)
                    )
                    old_i, old_j = min(pay[n, a], old), min(pay[n, b], old)
                    new_i, new_j = min(pay[n, a], new), min(pay[n, b], new)
                    least[depth + 1, i, j] -= weight[n] * (min(old_i, old_j) - min(new_i, new_j))
                    pair[depth + 1, i, j] -= weight[n] * (
                        max(0, old_i + old_j - old) - max(0, new_i + new_j - new)
                    )
        count[depth + 1] = m
        at[depth + 1] = 0
        depth += 1
    return True, work


@compiled
def costs(
    sets: Any, modes: Any, price: Any, weight: Any, first: Any, users: Any, user_pay: Any,
    home_first: Any, home_rank: Any, home_weight: Any, num_ranks: Any,
) -> Any:  # fmt: skip
    """[M, Q] cost less prices of the sets [M, s] in their modes [M, s], for each rank."""
    found = np.zeros((len(sets), num_ranks), np.int64)
    left_of = np.full(weight.size, UNIT, np.int64)
    for m in range(len(sets)):
        total = 0
        for z in range(sets.shape[1]):
            e = sets[m, z]
            total -= price[modes[m, z], e]
            for q in range(first[e], first[e + 1]):
                n = users[q]
                paid = left_of[n]
                if paid == 0:
                    continue
                if modes[m, z] == 1:
                    paid = min(paid, user_pay[q])
                left_of[n] -= paid
                total += weight[n] * paid
                for h in range(home_first[n], home_first[n + 1]):
                    found[m, home_rank[h]] -= home_weight[h] * paid
        for e in sets[m]:
            for q in range(first[e], first[e + 1]):
                left_of[users[q]] = UNIT
        found[m] += total
    return found


@compiled
def descend(
    chosen: Any, modes: Any, away: Any, price: Any, first: Any, users: Any, user_pay: Any,
    most_shared: Any,
) -> Any:  # fmt: skip
    """Swap experts and modes of a set [s] in place while its cost less prices falls.

    Args:
        away: [N] tokens whose home is elsewhere.

    Returns:
        Tokens that were looked at.
    """
    num_experts, size = price.shape[1], chosen.size
    total = np.zeros(away.size, np.int64)  # what the experts of the set would pay, beyond UNIT too
    inside = np.zeros(num_experts, np.bool_)
    num_shared, work = 0, 0
    for z in range(size):
        e = chosen[z]
        inside[e] = True
        num_shared += modes[z]
        for q in range(first[e], first[e + 1]):
            total[users[q]] += UNIT if modes[z] == 0 else user_pay[q]
    while True:
        best, best_out, best_in, best_mode = 0, -1, -1, 0
        for z in range(size):
            out = chosen[z]
            left = price[modes[z], out]
            for q in range(first[out], first[out + 1]):
                n = users[q]
                before = min(UNIT, total[n])
                total[n] -= UNIT if modes[z] == 0 else user_pay[q]
                left += away[n] * (min(UNIT, total[n]) - before)
            for e in range(num_experts):
                if inside[e] and e != out:
                    continue
                change_alone, change_shared = left - price[0, e], left - price[1, e]
                work += first[e + 1] - first[e]
                for q in range(first[e], first[e + 1]):
                    n = users[q]
                    room = UNIT - min(UNIT, total[n])
                    change_alone += away[n] * room
                    change_shared += away[n] * min(room, user_pay[q])
                if change_alone < best:
                    best, best_out, best_in, best_mode = change_alone, z, e, 0
                if change_shared < best and num_shared - modes[z] < most_shared:
                    best, best_out, best_in, best_mode = change_shared, z, e, 1
            for q in range(first[out], first[out + 1]):
                total[users[q]] += UNIT if modes[z] == 0 else user_pay[q]
        if best_out < 0:
            return work
        out = chosen[best_out]
        for q in range(first[out], first[out + 1]):
            total[users[q]] -= UNIT if modes[best_out] == 0 else user_pay[q]
        for q in range(first[best_in], first[best_in + 1]):
            total[users[q]] += UNIT if best_mode == 0 else user_pay[q]
        inside[out], inside[best_in] = False, True
        num_shared += best_mode - modes[best_out]
        chosen[best_out], modes[best_out] = best_in, best_mode


@compiled
def slopes(
    sets: Any, modes: Any, each: Any, several: Any, weight: Any, experts: Any, pay: Any,
    home_first: Any, home_rank: Any, home_weight: Any,
) -> Any:  # fmt: skip
    """[N, K] how the bound changes with what each copy pays, per token.

    Args:
        sets, modes: [M, s] the set of each rank.
        each: whether set q is that of rank q, where the tokens' homes count.
        several: [E] whether an expert is taken to have copies.
    """
    num_ranks, num_experts = len(sets), several.size
    mode_of = np.full((num_ranks, num_experts), -1, np.int64)
    for g in range(num_ranks):
        for z in range(sets.shape[1]):
            mode_of[g, sets[g, z]] = modes[g, z]
    found = np.zeros(experts.shape)
    at_home = np.zeros(num_ranks, np.int64)
    for n in range(weight.size):
        width = 0
        while width < experts.shape[1] and experts[n, width] >= 0:
            if several[experts[n, width]]:
                found[n, width] = 1.0
            width += 1
        if each:
            for h in range(home_first[n], home_first[n + 1]):
                at_home[home_rank[h]] = home_weight[h]
        for g in range(num_ranks):
            total = 0
            for a in range(width):
                mode = mode_of[g, experts[n, a]]
                if mode == 0:
                    total += UNIT
                elif mode == 1:
                    total += pay[n, a]
            share = 1.0 if total > UNIT else at_home[g] / weight[n]
            at_home[g] = 0
            if share > 0.0:
                for a in range(width):
                    if mode_of[g, experts[n, a]] == 1:
                        found[n, a] -= share
    return found

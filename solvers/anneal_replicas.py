"""Kernels: simulated annealing of one layer with redundant slots, on token bitsets.

An expert with one copy is served there. A token that uses an expert with several copies is served
at home if a copy is there, else on a rank that it uses anyway for a single-copy expert, else on the
least loaded copy. So an expert with C copies costs no message for tokens that some copy's rank
covers, and one message for the share 1 - C / G of the others; what is free to go to any copy
prefers the less loaded ranks. It does not fill them up: a home knows no more than what it sent in
this batch, so that its preference is weak where batches are small (`steering`, see
docs/solvers.md). Where copies go, and which tokens they serve, is thus priced together.
(That two replicated experts of one token may share a rank is left out: the price is an upper one.)

A proposal recomputes the rows of the ranks that it touches and the experts with copies there:
O(slots_per_rank * T / 64).

Shape letters: E experts, G ranks, S slots, T tokens, W = ceil(T / 64) words, C copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.anneal import SQUARE_SHARE, below, popcount, seeded, uniform
from solvers.compiling import compiled
from solvers.walking import copies_of, serve_token

SWEEPS, DAMPING = 2, 0.7  # with which the split of free tokens is found


@compiled
def priced(row: Any, segments: Any, token_prices: Any) -> Any:
    """Price of one message of each token of row [W]."""
    total = 0.0
    for workload in range(token_prices.size):
        count = np.int64(0)
        part = row[segments[workload] : segments[workload + 1]]
        for w in range(part.size):  # of a slice, or it is not vectorised
            count += np.int64(popcount(part[w]))
        total += token_prices[workload] * count
    return total


@compiled
def cover_single(bits: Any, slots: Any, copies: Any, first: int, last: int, once: Any) -> None:
    """Fill once [W]: tokens with a single-copy expert in slots first..last - 1."""
    for w in range(once.size):
        once[w] = 0
    for slot in range(first, last):
        expert = slots[slot]
        if expert >= 0 and copies[expert] == 1:
            for w in range(once.size):
                once[w] |= bits[expert, w]


@compiled
def cover_ranks(once: Any, first: int, last: int, node: Any) -> None:
    """Fill node [W]: tokens in any of the rows first..last - 1 of once [G or more, W]."""
    for w in range(node.size):
        node[w] = 0
    for rank in range(first, last):
        for w in range(node.size):
            node[w] |= once[rank, w]


@compiled
def measure_expert(
    bits: Any, segments: Any, token_prices: Any, expert: int, where: Any, copies: Any, once: Any,
    base: int, shrink: int, exclusive: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Price of a message for each token of a replicated expert that no copy's group covers.

    Args:
        where: [E, C] ranks of each expert's copies; shrink: ranks per group at this level;
            base: first row of the level in `once`.
        exclusive: [E, C] filled, when shrink is 1, with the tokens that only this copy covers.
        scratch: [3, W] uint64.
    """
    words = once.shape[1]
    num_copies = copies[expert]
    for w in range(words):
        scratch[0, w] = 0  # covered by one or more
        scratch[1, w] = 0  # by two or more
    for i in range(num_copies):
        row = base + where[expert, i] // shrink
        for w in range(words):
            scratch[1, w] |= scratch[0, w] & once[row, w]
            scratch[0, w] |= once[row, w]
    for w in range(words):
        scratch[2, w] = bits[expert, w] & ~scratch[0, w]
    if shrink == 1:
        for i in range(num_copies):
            row = base + where[expert, i]
            only = np.int64(0)
            for w in range(words):
                only += np.int64(popcount(bits[expert, w] & once[row, w] & ~scratch[1, w]))
            exclusive[expert, i] = only
    return priced(scratch[2], segments, token_prices)


@compiled
def fill_load(
    load: Any, tokens: Any, copies: Any, where: Any, exclusive: Any, fair: Any, steering: float,
    split: Any, rank_load: Any,
) -> None:  # fmt: skip
    """Fill rank_load [G], in units of the mean and of each rank's fair share (see the module).

    Args:
        steering: how strongly free tokens prefer ranks with less load, see `solvers.layers`.
        split: [E, C] scratch: the load that each copy gets of tokens that are free to choose.
    """
    num_ranks = rank_load.size
    for rank in range(num_ranks):
        rank_load[rank] = 0.0
    for expert in range(copies.size):
        count = copies[expert]
        if count == 1:
            rank = where[expert, 0]
            rank_load[rank] += load[expert] / fair[rank]
        if count < 2:
            continue
        away = 1.0 - count / num_ranks
        bound = 0.0
        for i in range(count):
            bound += exclusive[expert, i] / max(tokens[expert], 1)
        free = load[expert] * away * max(0.0, 1.0 - bound) / count
        for i in range(count):
            rank = where[expert, i]
            share = away * exclusive[expert, i] / max(tokens[expert], 1) + 1.0 / num_ranks
            split[expert, i] = free
            rank_load[rank] += (load[expert] * share + free) / fair[rank]
    for _ in range(SWEEPS):
        for expert in range(copies.size):
            count = copies[expert]
            if count < 2:
                continue
            lowest = 1e300
            free = 0.0
            for i in range(count):
                lowest = min(lowest, rank_load[where[expert, i]])
                free += split[expert, i]
            if free <= 0.0:
                continue
            total = 0.0
            for i in range(count):
                total += np.exp(steering * (lowest - rank_load[where[expert, i]]))
            # shares by the loads before any of them changes
            scale = free / total
            for i in range(count):
                rank = where[expert, i]
                wanted = scale * np.exp(steering * (lowest - rank_load[rank]))
                change = DAMPING * (wanted - split[expert, i])
                split[expert, i] += change
                rank_load[rank] += change / fair[rank]


@compiled
def anneal_layer_replicas(
    bits: Any,
    segments: Any,
    token_prices: Any,
    groups: Any,
    row_prices: Any,
    loads: Any,
    load_prices: Any,
    fair: Any,
    held: Any,
    move_price: float,
    slots: Any,
    free: Any,
    temperature: float,
    cooling: float,
    proposals: int,
    seed: int,
    hot: Any,
    steering: float,
    stop: Any,
) -> Any:
    """Anneal the slots of one layer in place; leave the best state in `slots`.

    Minimises what `solvers.anneal.anneal_layer` does, with alltoall traffic.
    Moves: swap two slots of different ranks; give a redundant or empty slot to another expert.

    Args:
        bits .. seed, stop: as there.
        hot: [H] int64 experts to draw replicas from, hotter ones more often.
        steering: see `fill_load`.

    Returns:
        The best cost that was seen.
    """
    num_slots = slots.size
    num_ranks = groups[0]
    width = num_slots // num_ranks
    num_experts = bits.shape[0] - 1
    words = bits.shape[1]
    levels = groups.size
    num_rows = row_prices.size
    most = min(num_ranks, num_slots - num_experts + 1)
    copies = np.zeros(num_experts, np.int64)
    where = np.zeros((num_experts, most + 1), np.int64)
    exclusive = np.zeros((num_experts, most + 1), np.int64)
    tokens = np.zeros(num_experts, np.int64)
    for expert in range(num_experts):
        for w in range(words):
            tokens[expert] += np.int64(popcount(bits[expert, w]))
    for slot in range(num_slots):
        expert = slots[slot]
        if expert >= 0:
            where[expert, copies[expert]] = slot // width
            copies[expert] += 1
    once = np.zeros((num_rows, words), np.uint64)
    old_once = np.zeros((num_rows, words), np.uint64)
    scratch = np.zeros((3, words), np.uint64)
    row_cost = np.zeros(num_rows, np.float64)
    old_cost = np.zeros(num_rows, np.float64)
    uncovered = np.zeros((levels, num_experts), np.float64)
    old_uncovered = np.zeros((levels, num_experts), np.float64)
    rank_load = np.zeros(num_ranks, np.float64)
    split = np.zeros((num_experts, most + 1), np.float64)
    touched = np.zeros(num_ranks, np.bool_)
    stale = np.zeros((levels, num_experts), np.bool_)
    best_slots = slots.copy()
    state = seeded(seed)
    cost = 0.0
    best = 1e300
    if free.size < 2:
        return best
    for step in range(proposals + 1):
        if step & 63 == 1 and stop[0] != 0:
            break
        first_time = step == 0
        slot_a = -1
        slot_b = -1
        old_a = np.int64(-1)
        old_b = np.int64(-1)
        for rank in range(num_ranks):
            touched[rank] = first_time
        stale[:] = False
        if not first_time:
            temperature *= cooling
            slot_a = free[below(state, free.size)]
            old_a = slots[slot_a]
            rank_a = slot_a // width
            redundant = old_a < 0 or copies[old_a] > 1
            if redundant and below(state, 2) == 0:
                expert = hot[below(state, hot.size)]
                present = False
                for i in range(copies[expert]):
                    present = present or where[expert, i] == rank_a
                if present or copies[expert] >= most:
                    continue
                if old_a >= 0:
                    remove_copy(where, copies, old_a, rank_a)
                    if copies[old_a] == 1:
                        touched[where[old_a, 0]] = True
                    stale[:, old_a] = True
                if copies[expert] == 1:
                    touched[where[expert, 0]] = True
                where[expert, copies[expert]] = rank_a
                copies[expert] += 1
                stale[:, expert] = True
                slots[slot_a] = expert
            else:
                slot_b = free[below(state, free.size)]
                old_b = slots[slot_b]
                rank_b = slot_b // width
                if rank_a == rank_b or old_a == old_b:
                    continue
                present = False
                if old_a >= 0:
                    for i in range(copies[old_a]):
                        present = present or where[old_a, i] == rank_b
                if old_b >= 0:
                    for i in range(copies[old_b]):
                        present = present or where[old_b, i] == rank_a
                if present:
                    continue
                if old_a >= 0:
                    move_copy(where, copies, old_a, rank_a, rank_b)
                    stale[:, old_a] = True
                    touched[rank_a] = touched[rank_a] or copies[old_a] == 1
                    touched[rank_b] = touched[rank_b] or copies[old_a] == 1
                if old_b >= 0:
                    move_copy(where, copies, old_b, rank_b, rank_a)
                    stale[:, old_b] = True
                    touched[rank_a] = touched[rank_a] or copies[old_b] == 1
                    touched[rank_b] = touched[rank_b] or copies[old_b] == 1
                slots[slot_a] = old_b
                slots[slot_b] = old_a
        # recompute what the move touched, keeping the old values
        base = 0
        for level in range(levels):
            shrink = num_ranks // groups[level]
            size = num_slots // groups[level]
            for group in range(groups[level]):
                hit = False
                for rank in range(group * shrink, (group + 1) * shrink):
                    hit = hit or touched[rank]
                if not hit:
                    continue
                row = base + group
                old_cost[row] = row_cost[row]
                for w in range(words):
                    old_once[row, w] = once[row, w]
                if level == 0:
                    cover_single(bits, slots, copies, group * size, (group + 1) * size, once[row])
                else:  # the rows of its ranks are new by now
                    cover_ranks(once, group * shrink, (group + 1) * shrink, once[row])
                row_cost[row] = row_prices[row] * priced(once[row], segments, token_prices)
                for slot in range(group * size, (group + 1) * size):
                    if slots[slot] >= 0:
                        stale[level, slots[slot]] = True
            base += groups[level]
        base = 0
        new_cost = 0.0
        for level in range(levels):
            shrink = num_ranks // groups[level]
            for group in range(groups[level]):
                new_cost += row_cost[base + group]
            for expert in range(num_experts):
                if stale[level, expert]:
                    old_uncovered[level, expert] = uncovered[level, expert]
                    if copies[expert] > 1:
                        uncovered[level, expert] = measure_expert(
                            bits, segments, token_prices, expert, where, copies, once, base,
                            shrink, exclusive, scratch,
                        )  # fmt: skip
                if copies[expert] > 1:
                    here = copies[expert]
                    if level > 0:
                        here = distinct_groups(where, copies, expert, shrink)
                    away = (1.0 - here / groups[level]) / (1.0 - 1.0 / groups[level])
                    price = 0.0
                    for i in range(copies[expert]):
                        price += row_prices[base + where[expert, i] // shrink] / copies[expert]
                    new_cost += away * price * uncovered[level, expert]
            base += groups[level]
        for scenario in range(loads.shape[0]):
            if load_prices[scenario] == 0:
                continue
            fill_load(
                loads[scenario], tokens, copies, where, exclusive, fair, steering, split, rank_load
            )
            highest = 0.0
            squares = 0.0
            for rank in range(num_ranks):
                squares += rank_load[rank] * rank_load[rank] * fair[rank] / num_ranks
                highest = max(highest, rank_load[rank])
            new_cost += load_prices[scenario] * (highest + SQUARE_SHARE * squares)
        if move_price != 0:
            for slot in range(num_slots):
                if slots[slot] >= 0 and not held[slots[slot], slot // width]:
                    new_cost += move_price
        if first_time or new_cost - cost <= -temperature * np.log(uniform(state) + 1e-300):
            cost = new_cost
            if cost < best - 1e-12:
                best = cost
                for slot in range(num_slots):
                    best_slots[slot] = slots[slot]
            continue
        # undo
        if slot_b >= 0:
            slots[slot_a] = old_a
            slots[slot_b] = old_b
            rank_a = slot_a // width
            rank_b = slot_b // width
            if old_a >= 0:
                move_copy(where, copies, old_a, rank_b, rank_a)
            if old_b >= 0:
                move_copy(where, copies, old_b, rank_a, rank_b)
        else:
            rank_a = slot_a // width
            remove_copy(where, copies, slots[slot_a], rank_a)
            slots[slot_a] = old_a
            if old_a >= 0:
                where[old_a, copies[old_a]] = rank_a
                copies[old_a] += 1
        base = 0
        for level in range(levels):
            shrink = num_ranks // groups[level]
            for group in range(groups[level]):
                hit = False
                for rank in range(group * shrink, (group + 1) * shrink):
                    hit = hit or touched[rank]
                if hit:
                    row = base + group
                    row_cost[row] = old_cost[row]
                    for w in range(words):
                        once[row, w] = old_once[row, w]
            for expert in range(num_experts):
                if stale[level, expert]:
                    uncovered[level, expert] = old_uncovered[level, expert]
            base += groups[level]
        for expert in range(num_experts):
            # the order of copies may have changed: measure again
            if stale[0, expert] and copies[expert] > 1:
                measure_expert(
                    bits, segments, token_prices, expert, where, copies, once, 0, 1, exclusive,
                    scratch,
                )  # fmt: skip
    for slot in range(num_slots):
        slots[slot] = best_slots[slot]
    return best


@compiled
def distinct_groups(where: Any, copies: Any, expert: int, shrink: int) -> Any:
    """How many groups of `shrink` ranks hold a copy."""
    count = 0
    for i in range(copies[expert]):
        fresh = True
        for j in range(i):
            fresh = fresh and where[expert, i] // shrink != where[expert, j] // shrink
        if fresh:
            count += 1
    return count


@compiled
def remove_copy(where: Any, copies: Any, expert: int, rank: int) -> None:
    """Forget the copy on `rank`; the last one takes its place in the list."""
    last = copies[expert] - 1
    for i in range(last + 1):
        if where[expert, i] == rank:
            where[expert, i] = where[expert, last]
            break
    copies[expert] = last


@compiled
def move_copy(where: Any, copies: Any, expert: int, source: int, target: int) -> None:
    """The copy on rank `source` is now on `target`."""
    for i in range(copies[expert]):
        if where[expert, i] == source:
            where[expert, i] = target
            return


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

"""Kernels: simulated annealing of one layer with redundant slots under coherent dispatch.

Where tokens are when they enter the layer, and what the next layer holds, are token bitsets that
stay as they are. Of one layer the traffic of a token is twice the ranks that serve it, less one if
its home is among them, less what the next layer saves because of where the primary expert was
served (`solvers.coherent_replicas` says how that is counted).

An expert is served at home if a copy is there, an expert with one copy is served there; this much
is certain and covers ranks. Any other expert costs nothing for tokens that a copy's rank covers,
else one more rank. (That two such experts of one token may share a rank is left out: the price is
an upper one.) The tokens that no home and no covering rank decide go to the copies of the one node
that they touch, or else to all copies, in equal shares.

A proposal recomputes the rows of the ranks that it touches and the replicated experts there:
O(slots_per_rank * T / 64).

Shape letters: E experts, G ranks, N nodes, S slots, T tokens, W = ceil(T / 64) words, C copies,
R = G, or G + N where messages to nodes count: rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.anneal import below, count_bits, popcount, seeded, unevenness, uniform
from solvers.compiling import compiled


@compiled
def both(first: Any, second: Any, segments: Any, token_prices: Any) -> Any:
    """Price of one message of each token in both rows [W]."""
    total = 0.0
    for workload in range(token_prices.size):
        count = np.int64(0)
        one = first[segments[workload] : segments[workload + 1]]  # of slices it is vectorised
        other = second[segments[workload] : segments[workload + 1]]
        for w in range(one.size):
            count += np.int64(popcount(one[w] & other[w]))
        total += token_prices[workload] * count
    return total


@compiled
def cover_certain(
    bits: Any, slots: Any, copies: Any, first: int, last: int, home: Any, once: Any
) -> None:
    """Fill once [W]: tokens that an expert in slots first..last - 1 of one rank is sure to serve.

    Args:
        home: [W] tokens that are on that rank.
    """
    for w in range(once.size):
        once[w] = 0
    for slot in range(first, last):
        expert = slots[slot]
        if expert >= 0:
            if copies[expert] == 1:
                for w in range(once.size):
                    once[w] |= bits[expert, w]
            else:
                for w in range(once.size):
                    once[w] |= bits[expert, w] & home[w]


@compiled
def saved_next(
    tokens: Any, rank: int, gain: Any, loss: Any, row_prices: Any, num_ranks: int, shrink: int,
    segments: Any, token_prices: Any,
) -> Any:  # fmt: skip
    """What the next layer saves when tokens [W] enter it on a rank, see `anneal_layer_coherent`."""
    saved = row_prices[rank] * (
        both(tokens, gain[rank], segments, token_prices)
        - both(tokens, loss[rank], segments, token_prices)
    )
    if gain.shape[0] > num_ranks:
        node = num_ranks + rank // shrink
        saved += row_prices[node] * both(tokens, gain[node], segments, token_prices)
    return saved


@compiled
def measure_copies(
    bits: Any, primary_bits: Any, expert: int, num_copies: int, ranks: Any, once: Any, home: Any,
    gain: Any, loss: Any, row_prices: Any, num_ranks: int, shrink: int, segments: Any,
    token_prices: Any, fixed: Any, scratch: Any,
) -> Any:  # fmt: skip
    """What a replicated expert's tokens cost beyond the rows that are certain.

    Args:
        ranks: [C] of its copies.
        shrink: ranks per node.
        fixed: [C] filled with the tokens that only this copy can serve, or its share of those that
            only this node's copies can.
        scratch: [5, W] uint64.
    """
    words = once.shape[1]
    nodes_count = once.shape[0] > num_ranks
    away = scratch[0]  # neither at home nor covered, in the end
    primary = scratch[1]
    covered = scratch[2]
    often = scratch[3]
    taken = scratch[4]
    for w in range(words):
        away[w] = bits[expert, w]
        primary[w] = primary_bits[expert, w]
        covered[w] = 0
        often[w] = 0
    cost = 0.0
    for i in range(num_copies):
        rank = ranks[i]
        for w in range(words):
            taken[w] = primary_bits[expert, w] & home[rank, w]
            away[w] &= ~home[rank, w]
            primary[w] &= ~home[rank, w]
        fixed[i] = 0
        for w in range(words):
            fixed[i] += np.int64(popcount(bits[expert, w] & home[rank, w]))
        cost -= saved_next(
            taken, rank, gain, loss, row_prices, num_ranks, shrink, segments, token_prices
        )
    for i in range(num_copies):
        rank = ranks[i]
        for w in range(words):
            here = away[w] & once[rank, w]
            often[w] |= covered[w] & here
            covered[w] |= here
            taken[w] = primary[w] & here
            primary[w] &= ~here
        cost -= saved_next(
            taken, rank, gain, loss, row_prices, num_ranks, shrink, segments, token_prices
        )
    rank_price = 0.0
    node_price = 0.0
    for i in range(num_copies):
        rank = ranks[i]
        for w in range(words):
            fixed[i] += np.int64(popcount(away[w] & once[rank, w] & ~often[w]))
        rank_price += row_prices[rank] / num_copies
        if nodes_count:
            node_price += row_prices[num_ranks + rank // shrink] / num_copies
        saved = saved_next(
            primary, rank, gain, loss, row_prices, num_ranks, shrink, segments, token_prices
        )
        cost -= saved / num_copies
    for w in range(words):
        away[w] &= ~covered[w]
    cost += 2 * rank_price * both(away, away, segments, token_prices)
    if nodes_count:
        near_copies(away, num_copies, ranks, once, home, num_ranks, shrink, scratch[1:4], fixed)
        for i in range(num_copies):
            node = num_ranks + ranks[i] // shrink
            for w in range(words):
                away[w] &= ~once[node, w]
        cost += 2 * node_price * both(away, away, segments, token_prices)
        for w in range(words):
            covered[w] = 0
        for i in range(num_copies):
            node = num_ranks + ranks[i] // shrink
            for w in range(words):
                covered[w] |= home[node, w]
        cost -= node_price * both(away, covered, segments, token_prices)
    return cost


@compiled
def near_copies(
    away: Any, num_copies: int, ranks: Any, once: Any, home: Any, num_ranks: int, shrink: int,
    scratch: Any, fixed: Any,
) -> None:  # fmt: skip
    """Add to fixed [C] the tokens of away [W] that are sure to touch one node with copies only.

    The copies of that node share them.
    """
    words = away.size
    near, often, touched = scratch[0], scratch[1], scratch[2]
    for w in range(words):
        near[w] = 0
        often[w] = 0
    previous = np.int64(-1)
    for i in range(num_copies):  # ranks are in order, so those of a node follow each other
        node = num_ranks + ranks[i] // shrink
        if node != previous:
            for w in range(words):
                touched[w] = once[node, w] | home[node, w]
                often[w] |= near[w] & touched[w]
                near[w] |= touched[w]
        previous = node
    first = 0
    while first < num_copies:
        node = num_ranks + ranks[first] // shrink
        last = first
        while last < num_copies and num_ranks + ranks[last] // shrink == node:
            last += 1
        count = np.int64(0)
        for w in range(words):
            count += np.int64(popcount(away[w] & (once[node, w] | home[node, w]) & ~often[w]))
        for i in range(first, last):
            fixed[i] += count / (last - first)
        first = last


@compiled
def fill_load(
    load: Any, tokens: Any, copies: Any, where: Any, fixed: Any, fair: Any, rank_load: Any
) -> None:
    """Fill rank_load [G], in units of the mean and of each rank's fair share (see the module)."""
    rank_load[:] = 0.0
    for expert in range(copies.size):
        count = copies[expert]
        if count == 1:
            rank_load[where[expert, 0]] += load[expert] / fair[where[expert, 0]]
            continue
        free = tokens[expert]
        for i in range(count):
            free -= fixed[expert, i]
        per_token = load[expert] / max(tokens[expert], 1)
        for i in range(count):
            rank = where[expert, i]
            rank_load[rank] += per_token * (fixed[expert, i] + free / count) / fair[rank]


@compiled
def holds(where: Any, copies: Any, expert: int, rank: int) -> Any:
    """Whether `rank` has a copy."""
    found = False
    for i in range(copies[expert]):
        found = found or where[expert, i] == rank
    return found


@compiled
def change_copy(where: Any, copies: Any, expert: int, source: int, target: int) -> None:
    """Forget the copy on rank `source` and add one on `target`, -1 = none; ranks stay in order."""
    ranks = where[expert]
    count = copies[expert]
    if source >= 0:
        i = 0
        while ranks[i] != source:
            i += 1
        for j in range(i, count - 1):
            ranks[j] = ranks[j + 1]
        count -= 1
    if target >= 0:
        i = count
        while i > 0 and ranks[i - 1] > target:
            ranks[i] = ranks[i - 1]
            i -= 1
        ranks[i] = target
        count += 1
    copies[expert] = count


@compiled
def anneal_layer_coherent(
    bits: Any,
    primary_bits: Any,
    segments: Any,
    token_prices: Any,
    num_ranks: int,
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
    home: Any,
    gain: Any,
    loss: Any,
    served: Any,
    stop: Any,
) -> Any:
    """Anneal the slots of one layer in place; leave the best state in `slots`.

    Minimises the sum over workloads of token price x row price x traffic + the sum over scenarios
    of load price x (max + SQUARE_SHARE x mean square) of relative rank load + move price x moves.
    Moves: swap two slots of different ranks; give a redundant or empty slot to another expert;
    empty a redundant slot. Cost: see the module's docstring.

    Args:
        bits: [E + 1, W] uint64 tokens of each expert, from `pack_bits`.
        primary_bits: [E + 1, W] tokens of which each expert is the primary.
        segments: [workloads + 1] int64 first word of each workload's tokens, and W.
        token_prices: [workloads] float64 price of one message of one of its tokens.
        row_prices: [R] float64 price of a message to each rank, and to each node if they count.
        loads .. seed: as in `solvers.anneal.anneal_layer`.
        hot: [H] int64 experts to draw replicas from, hotter ones more often.
        home: [R, W] tokens that enter the layer on each rank, and on each node.
        gain, loss: [R, W] tokens for which the next layer costs a message less, or more, when they
            enter it there.
        served: [C, G] relative rank load that the slots have at first, when every token chooses
            its copies; what the estimate misses is taken to stay the same.
        stop: [1] int64, not 0 once another thread wants the search to end.

    Returns:
        The best cost that was seen.
    """
    num_slots = slots.size
    width = num_slots // num_ranks
    num_experts = bits.shape[0] - 1
    words = bits.shape[1]
    num_rows = row_prices.size
    num_nodes = num_rows - num_ranks
    shrink = num_ranks // num_nodes if num_nodes > 0 else 1
    most = min(num_ranks, num_slots - num_experts + 1)
    copies = np.zeros(num_experts, np.int64)
    where = np.zeros((num_experts, most + 1), np.int64)
    fixed = np.zeros((num_experts, most + 1), np.float64)
    old_where = np.zeros((2, most + 1), np.int64)
    old_copies = np.zeros(2, np.int64)
    old_fixed = np.zeros((num_experts, most + 1), np.float64)
    tokens = np.zeros(num_experts, np.int64)
    leaving = np.zeros((num_experts, num_ranks), np.float64)  # saved next, if the only copy is here
    for expert in range(num_experts):
        tokens[expert] = count_bits(bits[expert])
        for rank in range(num_ranks):
            leaving[expert, rank] = saved_next(
                primary_bits[expert], rank, gain, loss, row_prices, num_ranks, shrink, segments,
                token_prices,
            )  # fmt: skip
    for slot in range(num_slots):
        if slots[slot] >= 0:
            change_copy(where, copies, slots[slot], -1, slot // width)
    once = np.zeros((num_rows, words), np.uint64)
    old_once = np.zeros((num_rows, words), np.uint64)
    scratch = np.zeros((5, words), np.uint64)
    row_cost = np.zeros(num_rows, np.float64)
    old_row_cost = np.zeros(num_rows, np.float64)
    own_cost = np.zeros(num_experts, np.float64)
    old_own_cost = np.zeros(num_experts, np.float64)
    rank_load = np.zeros(num_ranks, np.float64)
    missed = np.zeros((loads.shape[0], num_ranks), np.float64)
    touched = np.zeros(num_rows, np.bool_)
    stale = np.zeros(num_experts, np.bool_)
    changed = np.full(2, -1, np.int64)  # experts whose copies the proposal changed
    best_slots = slots.copy()
    state = seeded(seed)
    cost = 0.0
    best = 1e300
    if num_ranks == 1 or free.size < 2:
        return best
    for step in range(proposals + 1):
        if step & 63 == 1 and stop[0] != 0:
            break
        slot_a = np.int64(-1)
        slot_b = np.int64(-1)
        old_a = np.int64(-1)
        old_b = np.int64(-1)
        changed[:] = -1
        touched[:] = step == 0
        stale[:] = step == 0
        if step > 0:
            temperature *= cooling
            slot_a = free[below(state, free.size)]
            old_a = slots[slot_a]
            rank_a = slot_a // width
            new_a = np.int64(-1)
            redundant = old_a < 0 or copies[old_a] > 1
            if redundant and below(state, 2) == 0:
                if old_a < 0 or below(state, 8) > 0:
                    new_a = hot[below(state, hot.size)]
                    if holds(where, copies, new_a, rank_a) or copies[new_a] >= most:
                        continue
                changed[0] = old_a
                changed[1] = new_a
            else:
                slot_b = free[below(state, free.size)]
                old_b = slots[slot_b]
                rank_b = slot_b // width
                if rank_a == rank_b or old_a == old_b:
                    continue
                if old_a >= 0 and holds(where, copies, old_a, rank_b):
                    continue
                if old_b >= 0 and holds(where, copies, old_b, rank_a):
                    continue
                new_a = old_b
                touched[rank_b] = True
                changed[0] = old_a
                changed[1] = old_b
            touched[rank_a] = True
            for i in range(2):
                expert = changed[i]
                if expert < 0:
                    continue
                stale[expert] = True
                old_copies[i] = copies[expert]
                for j in range(copies[expert]):
                    old_where[i, j] = where[expert, j]
                if slot_b < 0 and copies[expert] == 1:
                    touched[where[expert, 0]] = True
                there = np.int64(-1) if slot_b < 0 else slot_b // width
                if i == 0:
                    change_copy(where, copies, expert, rank_a, there)
                else:
                    change_copy(where, copies, expert, there, rank_a)
                if slot_b < 0 and copies[expert] == 1:
                    touched[where[expert, 0]] = True
            slots[slot_a] = new_a
            if slot_b >= 0:
                slots[slot_b] = old_a
        # recompute what the move touched, keeping the old values
        traffic = 0.0
        for rank in range(num_ranks):
            if touched[rank]:
                old_row_cost[rank] = row_cost[rank]
                old_once[rank, :] = once[rank, :]
                cover_certain(
                    bits, slots, copies, rank * width, (rank + 1) * width, home[rank], once[rank]
                )
                if num_nodes > 0:
                    touched[num_ranks + rank // shrink] = True
                else:
                    for slot in range(rank * width, (rank + 1) * width):
                        if slots[slot] >= 0 and copies[slots[slot]] > 1:
                            stale[slots[slot]] = True
        for node in range(num_nodes):
            row = num_ranks + node
            if touched[row]:
                old_row_cost[row] = row_cost[row]
                for w in range(words):
                    old_once[row, w] = once[row, w]
                    once[row, w] = 0
                for rank in range(node * shrink, (node + 1) * shrink):
                    for w in range(words):
                        once[row, w] |= once[rank, w]
                for slot in range(node * shrink * width, (node + 1) * shrink * width):
                    if slots[slot] >= 0 and copies[slots[slot]] > 1:
                        stale[slots[slot]] = True
        for row in range(num_rows):
            if touched[row]:
                row_cost[row] = row_prices[row] * (
                    2 * both(once[row], once[row], segments, token_prices)
                    - both(once[row], home[row], segments, token_prices)
                )
        for expert in range(num_experts):
            if stale[expert]:
                old_own_cost[expert] = own_cost[expert]
                for i in range(most):
                    old_fixed[expert, i] = fixed[expert, i]
                if copies[expert] == 1:
                    own_cost[expert] = -leaving[expert, where[expert, 0]]
                else:
                    own_cost[expert] = measure_copies(
                        bits, primary_bits, expert, copies[expert], where[expert], once, home,
                        gain, loss, row_prices, num_ranks, shrink, segments, token_prices,
                        fixed[expert], scratch,
                    )  # fmt: skip
        for row in range(num_rows):
            traffic += row_cost[row]
        for expert in range(num_experts):
            traffic += own_cost[expert]
        new_cost = traffic
        for scenario in range(loads.shape[0]):
            if load_prices[scenario] == 0:
                continue
            fill_load(loads[scenario], tokens, copies, where, fixed, fair, rank_load)
            if step == 0:
                for rank in range(num_ranks):
                    missed[scenario, rank] = served[scenario, rank] - rank_load[rank]
            for rank in range(num_ranks):
                rank_load[rank] += missed[scenario, rank]
            new_cost += load_prices[scenario] * unevenness(rank_load, fair)
        if move_price != 0:
            for slot in range(num_slots):
                if slots[slot] >= 0 and not held[slots[slot], slot // width]:
                    new_cost += move_price
        if step == 0 or new_cost - cost <= -temperature * np.log(uniform(state) + 1e-300):
            cost = new_cost
            if cost < best - 1e-12:
                best = cost
                best_slots[:] = slots
            continue
        # undo
        slots[slot_a] = old_a
        if slot_b >= 0:
            slots[slot_b] = old_b
        for i in range(2):
            if changed[i] >= 0:
                copies[changed[i]] = old_copies[i]
                for j in range(old_copies[i]):
                    where[changed[i], j] = old_where[i, j]
        for row in range(num_rows):
            if touched[row]:
                row_cost[row] = old_row_cost[row]
                once[row, :] = old_once[row, :]
        for expert in range(num_experts):
            if stale[expert]:
                own_cost[expert] = old_own_cost[expert]
                for i in range(most):
                    fixed[expert, i] = old_fixed[expert, i]
    slots[:] = best_slots
    return best

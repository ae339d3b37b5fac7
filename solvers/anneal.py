"""Kernels: exact simulated annealing of one layer without replicas, on token bitsets.

For each expert the set of tokens that use it is a row of 64-bit words; for each rank two more rows
say which tokens have at least one and at least two of their experts there. The exact change of the
span under a swap is then a handful of AND-NOT and population counts: O(T / 64) a proposal,
O(log K * T / 64) an accepted one, which counts the experts of every token on a rank in bit planes.

Shape letters: E experts, G ranks, N nodes, S slots, T tokens, W = ceil(T / 64) words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from solvers.compiling import compiled

# What the mean squared relative rank load costs, as a share of the price of the maximum: it guides
# the search where the maximum is flat, and balances what the sample cannot tell.
SQUARE_SHARE = 0.05


@intrinsic
def popcount(typing_context: Any, word: Any) -> Any:
    """Number of set bits of a uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@compiled
def pack_bits(experts: Any, num_experts: int) -> Any:
    """[E + 1, W] uint64 tokens of each expert of one layer; the last row stays zero.

    Args:
        experts: [T, K] ids of one layer, -1 = unused.
    """
    num_tokens, top_k = experts.shape
    bits = np.zeros((num_experts + 1, (num_tokens + 63) // 64), np.uint64)
    for token in range(num_tokens):
        mask = np.uint64(1) << np.uint64(token & 63)
        for column in range(top_k):
            expert = experts[token, column]
            if expert >= 0:
                bits[expert, token >> 6] |= mask
    return bits


@compiled
def next_random(state: Any) -> Any:
    """One step of xorshift64*: a uint64, all bits of it good enough for proposals."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(2685821657736338717)


@compiled
def seeded(seed: int) -> Any:
    """[1] uint64, the state of the random numbers of a seed."""
    state = np.zeros(1, np.uint64)
    state[0] = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x2545F4914F6CDD1D)
    for _ in range(4):
        next_random(state)
    return state


@compiled
def uniform(state: Any) -> Any:
    """A float64 in [0, 1)."""
    return (next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def below(state: Any, limit: int) -> Any:
    """An integer in [0, limit)."""
    return np.int64(((next_random(state) >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32))


@compiled
def cover(bits: Any, slots: Any, first: int, last: int, once: Any, twice: Any) -> None:
    """Fill once / twice [W]: tokens with >= 1 / >= 2 experts in slots first..last - 1."""
    for w in range(once.size):
        once[w] = 0
        twice[w] = 0
    for slot in range(first, last):
        expert = slots[slot]
        if expert >= 0:
            for w in range(once.size):
                twice[w] |= once[w] & bits[expert, w]
                once[w] |= bits[expert, w]


@compiled
def add_tokens(planes: Any, tokens: Any, carry: Any) -> None:
    """Count one expert more for each of tokens [W]: planes [P, W] are the bits of the counts."""
    for w in range(carry.size):
        carry[w] = tokens[w]
    for p in range(planes.shape[0]):
        plane = planes[p]
        left = np.uint64(0)
        for w in range(carry.size):
            both = plane[w] & carry[w]
            plane[w] ^= carry[w]
            carry[w] = both
            left |= both
        if left == 0:
            break


@compiled
def num_planes(bits: Any) -> Any:
    """Bits of the largest number of experts that one token uses."""
    planes = np.zeros((8, bits.shape[1]), np.uint64)
    carry = np.zeros(bits.shape[1], np.uint64)
    for expert in range(bits.shape[0] - 1):
        add_tokens(planes, bits[expert], carry)
    used = 1
    for p in range(8):
        if planes[p].any():
            used = p + 1
    return used


@compiled
def count_group(bits: Any, slots: Any, first: int, last: int, planes: Any, carry: Any) -> None:
    """Fill planes [P, W] with how many experts each token has in slots first..last - 1."""
    planes[:] = 0
    for slot in range(first, last):
        if slots[slot] >= 0:
            add_tokens(planes, bits[slots[slot]], carry)


@compiled
def exchange(planes: Any, gone: Any, come: Any, scratch: Any, once: Any, twice: Any) -> None:
    """An expert with tokens gone [W] leaves a group and one with tokens come [W] enters it.

    Args:
        planes: [P, W] bits of the tokens' numbers of experts in the group; changed in place.
        scratch: [2, W].
        once, twice: [W] filled with the tokens that have >= 1 / >= 2 experts there.
    """
    carry, borrow = scratch[0], scratch[1]
    for w in range(once.size):
        carry[w] = come[w] & ~gone[w]
        borrow[w] = gone[w] & ~come[w]
        once[w] = 0
        twice[w] = 0
    for p in range(planes.shape[0]):
        plane = planes[p]
        for w in range(once.size):
            on = plane[w] & carry[w]
            off = ~plane[w] & borrow[w]
            plane[w] ^= carry[w] ^ borrow[w]
            carry[w] = on
            borrow[w] = off
            once[w] |= plane[w]
        if p > 0:
            for w in range(once.size):
                twice[w] |= plane[w]


@compiled
def swap_change(
    row_a: Any, row_b: Any, once_a: Any, twice_a: Any, once_b: Any, twice_b: Any, lo: int, hi: int
) -> Any:
    """Tokens that use A and B more when an expert goes from A to B and another from B to A.

    Words lo..hi - 1 are counted. Returns the change of A's tokens and that of B's.
    """
    # slices, whose indices are never negative: only then are the loops vectorised
    row_a, row_b = row_a[lo:hi], row_b[lo:hi]
    once_a, twice_a = once_a[lo:hi], twice_a[lo:hi]
    once_b, twice_b = once_b[lo:hi], twice_b[lo:hi]
    of_a = np.int64(0)
    of_b = np.int64(0)
    for w in range(row_a.size):
        only_a = row_a[w] & ~row_b[w]
        only_b = row_b[w] & ~row_a[w]
        of_a += np.int64(popcount(only_b & ~once_a[w])) - np.int64(popcount(only_a & ~twice_a[w]))
        of_b += np.int64(popcount(only_a & ~once_b[w])) - np.int64(popcount(only_b & ~twice_b[w]))
    return of_a, of_b


@compiled
def stay_change(
    row_a: Any,
    row_b: Any,
    once_a: Any,
    twice_a: Any,
    once_b: Any,
    twice_b: Any,
    home_a: Any,
    home_b: Any,
    primary_a: Any,
    primary_b: Any,
    next_a: Any,
    next_b: Any,
    lo: int,
    hi: int,
) -> Any:
    """Change, under the same swap, of how many tokens find an expert on the rank where they are.

    Counted entering this layer (home = where the previous layer left the token) and entering the
    next one (whose experts' ranks are next_a, next_b). Coherent dispatch saves a message each.
    Returns the change at A and that at B.
    """
    row_a, row_b = row_a[lo:hi], row_b[lo:hi]
    once_a, twice_a = once_a[lo:hi], twice_a[lo:hi]
    once_b, twice_b = once_b[lo:hi], twice_b[lo:hi]
    home_a, home_b = home_a[lo:hi], home_b[lo:hi]
    primary_a, primary_b = primary_a[lo:hi], primary_b[lo:hi]
    next_a, next_b = next_a[lo:hi], next_b[lo:hi]
    of_a = np.int64(0)
    of_b = np.int64(0)
    for w in range(row_a.size):
        only_a = row_a[w] & ~row_b[w]
        only_b = row_b[w] & ~row_a[w]
        of_a += np.int64(popcount(only_b & ~once_a[w] & home_a[w]))
        of_b += np.int64(popcount(only_a & ~once_b[w] & home_b[w]))
        of_a -= np.int64(popcount(only_a & ~twice_a[w] & home_a[w]))
        of_b -= np.int64(popcount(only_b & ~twice_b[w] & home_b[w]))
        of_a += np.int64(popcount(primary_b[w] & next_a[w]))
        of_b += np.int64(popcount(primary_a[w] & next_b[w]))
        of_a -= np.int64(popcount(primary_a[w] & next_a[w]))
        of_b -= np.int64(popcount(primary_b[w] & next_b[w]))
    return of_a, of_b


@compiled
def count_bits(row: Any) -> Any:
    """Number of set bits of a row [W]."""
    total = np.int64(0)
    for w in range(row.size):
        total += np.int64(popcount(row[w]))
    return total


@compiled
def unevenness(load: Any, fair: Any) -> Any:
    """Of relative rank loads [G]: max + SQUARE_SHARE x mean square, weighted by fair shares [G]."""
    highest = 0.0
    squares = 0.0
    for rank in range(load.size):
        squares += load[rank] * load[rank] * fair[rank] / load.size
        highest = max(highest, load[rank])
    return highest + SQUARE_SHARE * squares


@compiled
def anneal_layer(
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
    primary_bits: Any,
    home: Any,
    next_once: Any,
    stop: Any,
) -> Any:
    """Anneal the slots of one layer in place by swaps; leave the best state in `slots`.

    Minimises the sum over workloads and levels of token price x row price x traffic + the sum over
    scenarios of load price x (max + SQUARE_SHARE x mean square) of relative rank load + move price
    x moves. A level is a way to cut the slots into equal groups: ranks, nodes. The traffic of a
    token at a level is its span there, or with `primary_bits` (coherent dispatch) twice its span
    less one for each of the two layer boundaries at which it need not move. Cost: see the module's
    docstring.

    Args:
        bits: [E + 1, W] uint64 tokens of each expert, from `pack_bits`.
        segments: [workloads + 1] int64 first word of each workload's tokens, and W.
        token_prices: [workloads] float64 price of one message of one of its tokens.
        groups: [levels] int64 groups at each level, ranks first: [G] or [G, N].
        row_prices: [sum of groups] float64 price of a message to each group, levels stacked.
        loads: [C, E + 1] float64 load of each expert in each scenario, in units of the scenario's
            mean rank load; the last is 0.
        load_prices: [C] float64 price of each scenario's max / mean rank load.
        fair: [G] float64 load that is fair for each rank, 1 on average.
        held: [E + 1, G] bool whether an expert on that rank is no move; the last row is true.
        move_price: price of a move.
        slots: [S] int64 expert of each slot, -1 = empty; changed in place.
        free: [F] int64 slots that may be swapped.
        temperature, cooling: first temperature, factor per proposal.
        proposals: how many swaps to propose.
        seed: of the random numbers.
        primary_bits: [E + 1, W] tokens of which each expert is the primary; None when neighbouring
            layers do not matter, and then home and next_once are None too.
        home: [sum of groups, W] tokens that enter the layer in each group, levels stacked.
        next_once: [sum of groups, W] tokens with an expert of the next layer there.
        stop: [1] int64, not 0 once another thread wants the search to end.

    Returns:
        The best cost that was seen, less the cost of the traffic at the start.
    """
    num_slots = slots.size
    num_ranks = groups[0]
    width = num_slots // num_ranks
    empty = bits.shape[0] - 1
    num_scenarios = loads.shape[0]
    factor = 1 if primary_bits is None else 2
    num_rows = row_prices.size
    once = np.zeros((num_rows, bits.shape[1]), np.uint64)
    twice = np.zeros((num_rows, bits.shape[1]), np.uint64)
    planes = np.zeros((num_rows, num_planes(bits), bits.shape[1]), np.uint64)
    scratch = np.zeros((2, bits.shape[1]), np.uint64)
    base = 0
    for level in range(groups.size):
        size = num_slots // groups[level]
        for group in range(groups[level]):
            row = base + group
            count_group(bits, slots, group * size, (group + 1) * size, planes[row], scratch[0])
            cover(bits, slots, group * size, (group + 1) * size, once[row], twice[row])
        base += groups[level]
    best_slots = slots.copy()
    rank_load = np.zeros((num_scenarios, num_ranks), np.float64)
    cost = 0.0
    for slot in range(num_slots):
        expert = slots[slot]
        if expert >= 0:
            rank = slot // width
            for scenario in range(num_scenarios):
                rank_load[scenario, rank] += loads[scenario, expert] / fair[rank]
            if not held[expert, rank]:
                cost += move_price
    balance = 0.0
    for scenario in range(num_scenarios):
        balance += load_prices[scenario] * unevenness(rank_load[scenario], fair)
    cost += balance
    best = cost
    state = seeded(seed)
    if num_ranks == 1 or free.size < 2:
        return best
    for step in range(proposals):
        if step & 255 == 0 and stop[0] != 0:
            break
        temperature *= cooling
        slot_a = free[below(state, free.size)]
        slot_b = free[below(state, free.size)]
        rank_a = slot_a // width
        rank_b = slot_b // width
        expert_a = slots[slot_a]
        expert_b = slots[slot_b]
        if rank_a == rank_b or (expert_a < 0 and expert_b < 0):
            continue
        if expert_a < 0:
            expert_a = empty
        if expert_b < 0:
            expert_b = empty
        total = 0.0
        for scenario in range(num_scenarios):
            price = load_prices[scenario]
            if price == 0:
                continue
            moved = loads[scenario, expert_b] - loads[scenario, expert_a]
            old_a = rank_load[scenario, rank_a]
            old_b = rank_load[scenario, rank_b]
            new_a = old_a + moved / fair[rank_a]
            new_b = old_b - moved / fair[rank_b]
            others = 0.0
            for rank in range(num_ranks):
                if rank != rank_a and rank != rank_b and rank_load[scenario, rank] > others:
                    others = rank_load[scenario, rank]
            risen = max(new_a, new_b, others) - max(old_a, old_b, others)
            squares = (new_a * new_a - old_a * old_a) * fair[rank_a]
            squares += (new_b * new_b - old_b * old_b) * fair[rank_b]
            total += price * (risen + SQUARE_SHARE * squares / num_ranks)
        if move_price != 0:
            moves = np.int64(held[expert_a, rank_a]) + np.int64(held[expert_b, rank_b])
            moves -= np.int64(held[expert_a, rank_b]) + np.int64(held[expert_b, rank_a])
            total += move_price * moves
        base = 0
        for level in range(groups.size):
            size = num_slots // groups[level]
            a = base + slot_a // size
            b = base + slot_b // size
            base += groups[level]
            if a == b:
                continue
            for workload in range(token_prices.size):
                lo = segments[workload]
                hi = segments[workload + 1]
                of_a, of_b = swap_change(
                    bits[expert_a], bits[expert_b], once[a], twice[a], once[b], twice[b], lo, hi
                )
                of_a *= factor
                of_b *= factor
                if primary_bits is not None:
                    stay_a, stay_b = stay_change(
                        bits[expert_a], bits[expert_b], once[a], twice[a], once[b], twice[b],
                        home[a], home[b], primary_bits[expert_a], primary_bits[expert_b],
                        next_once[a], next_once[b], lo, hi,
                    )  # fmt: skip
                    of_a -= stay_a
                    of_b -= stay_b
                total += token_prices[workload] * (row_prices[a] * of_a + row_prices[b] * of_b)
        if total > -temperature * np.log(uniform(state) + 1e-300):
            continue
        slots[slot_a], slots[slot_b] = slots[slot_b], slots[slot_a]
        cost += total
        for scenario in range(num_scenarios):
            moved = loads[scenario, expert_b] - loads[scenario, expert_a]
            rank_load[scenario, rank_a] += moved / fair[rank_a]
            rank_load[scenario, rank_b] -= moved / fair[rank_b]
        base = 0
        for level in range(groups.size):
            size = num_slots // groups[level]
            a = base + slot_a // size
            b = base + slot_b // size
            base += groups[level]
            if a != b:
                row_a, row_b = bits[expert_a], bits[expert_b]
                exchange(planes[a], row_a, row_b, scratch, once[a], twice[a])
                exchange(planes[b], row_b, row_a, scratch, once[b], twice[b])
        if cost < best - 1e-12:
            best = cost
            for slot in range(num_slots):
                best_slots[slot] = slots[slot]
    for slot in range(num_slots):
        slots[slot] = best_slots[slot]
    return best

"""Kernel: simulated annealing of one layer with redundant slots, on token bitsets.

What a placement costs is what `solvers.replica_pricing` says. A proposal recomputes the rows of the
ranks that it touches, and the replicated experts there:
O((slots_per_rank + copies there) T / 64 + copies of all replicated experts).

Shape letters: E experts, G ranks, R = G or G + nodes rows, S slots, T tokens,
W = ceil(T / 64) words, C copies, M = ceil(G / 64) words.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from solvers.anneal import below, count_bits, seeded, unevenness, uniform
from solvers.compiling import compiled, compiled_lean
from solvers.copies import common_ranks, has_copy, move_copy, new_copies
from solvers.replica_pricing import (
    copy_row,
    count_exclusive,
    cover_ranks,
    cover_single,
    differ,
    fill_load,
    free_tokens,
    met,
    price_away,
    priced,
)

# What does not change: arguments of `anneal_layer_replicas`, row_of [levels, G] the row of each
# rank's group, and the tokens [E] of each expert.
Layer = namedtuple(
    "Layer",
    "bits segments token_prices groups row_prices loads load_prices fair held free hot "
    "row_of tokens",
)
# What rows, experts and ranks come to: once [R, W] tokens that a row's single-copy experts cover,
# row_cost [R]; bare [E, W] free tokens of a replicated expert, exclusive [E, G] tokens that only
# one copy covers, uncovered [levels, E] what the free ones cost, saved [E] what they save by
# meeting; single [C, G] load of single-copy experts over the mean and a rank's fair share.
Figures = namedtuple("Figures", "once row_cost bare exclusive uncovered saved single")
# What a proposal concerns: touched [G] ranks, mark [R] the last step that changed the row; changed
# [2] experts, -1 = none, and masks [2, M] of where they were; stale [levels + 1, E] experts to be
# measured again at each level, at last those whose savings are; num_stale [levels + 1].
Concern = namedtuple("Concern", "touched mark changed masks stale num_stale")
Scratch = namedtuple("Scratch", "rows rank_load split pull")


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
        steering: see `solvers.replica_pricing.fill_load`.

    Returns:
        The best cost that was seen.
    """
    num_ranks, levels = groups[0], groups.size
    num_experts, words = bits.shape[0] - 1, bits.shape[1]
    most = min(num_ranks, slots.size - num_experts + 1)
    copies = new_copies(slots, num_experts, num_ranks, most)
    tokens = np.zeros(num_experts, np.int64)
    for expert in range(num_experts):
        tokens[expert] = count_bits(bits[expert])
    row_of = np.zeros((levels, num_ranks), np.int64)
    base = 0
    for level in range(levels):
        for rank in range(num_ranks):
            row_of[level, rank] = base + rank * groups[level] // num_ranks
        base += groups[level]
    layer = Layer(
        bits, segments, token_prices, groups, row_prices, loads, load_prices, fair, held, free,
        hot, row_of, tokens,
    )  # fmt: skip
    figures = _new_figures(layer, loads.shape[0])
    old = _new_figures(layer, loads.shape[0])
    concern = Concern(
        np.zeros(num_ranks, np.int64),
        np.full(row_prices.size, -1, np.int64),
        np.full(2, -1, np.int64),
        np.zeros((2, copies.mask.shape[1]), np.uint64),
        np.zeros((levels + 1, num_experts), np.int64),
        np.zeros(levels + 1, np.int64),
    )
    scratch = Scratch(
        np.zeros((2, words), np.uint64),
        np.zeros(num_ranks, np.float64),
        np.zeros((num_experts, most), np.float64),
        np.zeros(most, np.float64),
    )
    best_slots = slots.copy()
    if free.size < 2:
        return 1e300
    best = _anneal(
        layer, copies, figures, old, concern, scratch, slots, best_slots, move_price, temperature,
        cooling, proposals, seeded(seed), steering, stop,
    )  # fmt: skip
    slots[:] = best_slots
    return best


@compiled
def _new_figures(layer: Any, num_scenarios: int) -> Any:
    num_experts, words = layer.tokens.size, layer.bits.shape[1]
    levels, num_ranks = layer.row_of.shape
    num_rows = layer.row_prices.size
    return Figures(
        np.zeros((num_rows, words), np.uint64),
        np.zeros(num_rows, np.float64),
        np.zeros((num_experts, words), np.uint64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((levels, num_experts), np.float64),
        np.zeros(num_experts, np.float64),
        np.zeros((num_scenarios, num_ranks), np.float64),
    )


@compiled_lean
def _anneal(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, scratch: Any, slots: Any,
    best_slots: Any, move_price: float, temperature: float, cooling: float, proposals: int,
    state: Any, steering: float, stop: Any,
) -> Any:  # fmt: skip
    """The loop of `anneal_layer_replicas`; fills best_slots and returns their cost."""
    num_ranks = layer.groups[0]
    width = slots.size // num_ranks
    moves = 0
    for slot in range(slots.size):
        if slots[slot] >= 0 and not layer.held[slots[slot], slot // width]:
            moves += 1
    for rank in range(num_ranks):
        concern.touched[rank] = rank
    cost = measured(
        layer, copies, figures, old, concern, scratch, slots, 0, num_ranks, steering, 0.0, 1e300
    )
    cost += move_price * moves
    best = cost
    for step in range(1, proposals + 1):
        if step & 63 == 1 and stop[0] != 0:
            break
        temperature *= cooling
        slot_a, slot_b, num_touched, moved = proposed(layer, copies, concern, slots, state, step)
        if slot_a < 0:
            continue
        allowed = cost - temperature * np.log(uniform(state) + 1e-300)
        new_cost = measured(
            layer, copies, figures, old, concern, scratch, slots, step, num_touched, steering,
            move_price * (moves + moved), allowed,
        )  # fmt: skip
        if new_cost > allowed:
            undo(layer, copies, figures, old, concern, slots, slot_a, slot_b, num_touched)
            continue
        cost = new_cost
        moves += moved
        if cost < best - 1e-12:
            best = cost
            copy_row(slots, best_slots)
    return best


@compiled_lean
def proposed(layer: Any, copies: Any, concern: Any, slots: Any, state: Any, step: int) -> Any:
    """Make a random move, if it is allowed.

    Returns:
        The slot that changed, -1 if none; the one that it was swapped with, -1 if it was given to
        another expert; how many ranks are touched; how many copies more are moves.
    """
    nothing = np.int64(-1), np.int64(-1), 0, 0
    width = slots.size // layer.groups[0]
    most = copies.ranks.shape[1]
    slot_a, slot_b = layer.free[below(state, layer.free.size)], np.int64(-1)
    rank_a, rank_b = slot_a // width, np.int64(-1)
    expert_a = slots[slot_a]
    if (expert_a < 0 or copies.count[expert_a] > 1) and below(state, 2) == 0:
        expert_b = layer.hot[below(state, layer.hot.size)]
        if copies.count[expert_b] >= most:
            return nothing
    else:
        slot_b = layer.free[below(state, layer.free.size)]
        rank_b = slot_b // width
        expert_b = slots[slot_b]
        if rank_a == rank_b or expert_a == expert_b:
            return nothing
        if expert_a >= 0 and has_copy(copies, expert_a, rank_b):
            return nothing
    if expert_b >= 0 and has_copy(copies, expert_b, rank_a):
        return nothing
    num_touched, moved = 0, 0
    concern.changed[0] = expert_a
    concern.changed[1] = expert_b
    for i in range(2):
        expert = concern.changed[i]
        if expert >= 0:
            copy_row(copies.mask[expert], concern.masks[i])
            num_touched = touch_single(copies, expert, step, concern, num_touched)
            moved -= misplaced(copies, expert, layer.held)
    move_copy(copies, expert_a, rank_a, rank_b)
    move_copy(copies, expert_b, rank_b, rank_a)
    slots[slot_a] = expert_b
    if slot_b >= 0:
        slots[slot_b] = expert_a
    for i in range(2):
        expert = concern.changed[i]
        if expert >= 0:
            num_touched = touch_single(copies, expert, step, concern, num_touched)
            moved += misplaced(copies, expert, layer.held)
    return slot_a, slot_b, num_touched, moved


@compiled_lean
def touch_single(copies: Any, expert: int, step: int, concern: Any, num_touched: int) -> Any:
    """Note the rank of a single-copy expert; the new number of ranks."""
    rank = copies.ranks[expert, 0]
    if copies.count[expert] != 1 or concern.mark[rank] == step:
        return num_touched
    concern.mark[rank] = step
    concern.touched[num_touched] = rank
    return num_touched + 1


@compiled_lean
def misplaced(copies: Any, expert: int, held: Any) -> Any:
    """How many of an expert's copies are moves."""
    count = 0
    for i in range(copies.count[expert]):
        if not held[expert, copies.ranks[expert, i]]:
            count += 1
    return count


@compiled_lean
def measured(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, scratch: Any, slots: Any,
    step: int, num_touched: int, steering: float, cost: float, allowed: float,
) -> Any:  # fmt: skip
    """Measure what a proposal concerns, keeping the old values; everything at step 0.

    Args:
        cost: of what is not measured.
        allowed: cost above which the proposal is refused; it need not be exact there.

    Returns:
        The cost of the new state.
    """
    cost += measure_rows(layer, copies, figures, old, concern, slots, step, num_touched)
    levels = layer.groups.size
    for level in range(levels):
        rows, stale = layer.row_of[level], concern.stale[level]
        concern.num_stale[level] = find_stale(copies, rows, concern, step, stale)
    measure_level(layer, copies, figures, old, concern, scratch.rows, 0)
    measure_saved(layer, copies, figures, old, concern, scratch.rows)
    for place in range(1, copies.listed[0] + 1):
        expert = copies.listed[place]
        cost += figures.uncovered[0, expert] - figures.saved[expert]
    cost += measure_load(
        layer, copies, figures, old, concern, scratch, slots, num_touched, steering
    )
    # nodes last, and not at all where the rest is too much already
    for level in range(1, levels):
        known = 0
        for place in range(1, copies.listed[0] + 1):
            expert = copies.listed[place]
            if known < concern.num_stale[level] and concern.stale[level, known] == expert:
                known += 1
            else:
                cost += figures.uncovered[level, expert]
        if cost > allowed:
            concern.num_stale[level] = 0
        measure_level(layer, copies, figures, old, concern, scratch.rows, level)
        for i in range(concern.num_stale[level]):
            cost += figures.uncovered[level, concern.stale[level, i]]
    return cost


@compiled_lean
def measure_rows(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, slots: Any, step: int,
    num_touched: int,
) -> Any:  # fmt: skip
    """Measure the rows of touched ranks and of their nodes; the price of all rows."""
    num_ranks = layer.groups[0]
    width = slots.size // num_ranks
    for level in range(layer.groups.size):
        rows = layer.row_of[level]
        for i in range(num_touched):
            rank = concern.touched[i]
            row = rows[rank]
            if level > 0 and concern.mark[row] == step:
                continue
            covered = figures.once[row]
            old.row_cost[row] = figures.row_cost[row]
            copy_row(covered, old.once[row])
            if level == 0:
                first = rank * width
                cover_single(layer.bits, slots, copies.count, first, first + width, covered)
            else:  # the rows of its ranks are new by now
                cover_ranks(figures.once, rows, row, covered)
            if level == 0 or differ(covered, old.once[row]):
                concern.mark[row] = step
                price = layer.row_prices[row]
                figures.row_cost[row] = price * priced(covered, layer.segments, layer.token_prices)
    cost = 0.0
    for row in range(figures.row_cost.size):
        cost += figures.row_cost[row]
    return cost


@compiled_lean
def find_stale(copies: Any, row_of: Any, concern: Any, step: int, stale: Any) -> Any:
    """Fill stale [E] with replicated experts that changed, or whose rows [G] did; their number."""
    count = 0
    for place in range(1, copies.listed[0] + 1):
        expert = copies.listed[place]
        again = step == 0 or expert == concern.changed[0] or expert == concern.changed[1]
        for i in range(copies.count[expert]):
            again = again or concern.mark[row_of[copies.ranks[expert, i]]] == step
        if again:
            stale[count] = expert
            count += 1
    return count


@compiled_lean
def measure_level(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, rows: Any, level: int
) -> None:
    """What the free tokens of stale experts cost at a level; at that of ranks also who they are."""
    row_of = layer.row_of[level]
    for i in range(concern.num_stale[level]):
        expert = concern.stale[level, i]
        ranks, tokens = copies.ranks[expert, : copies.count[expert]], layer.bits[expert]
        bare = rows[0]
        if level == 0:
            bare = figures.bare[expert]
            copy_row(bare, old.bare[expert])
            copy_row(figures.exclusive[expert], old.exclusive[expert])
            count_exclusive(tokens, ranks, figures.once, rows, figures.exclusive[expert])
        free_tokens(tokens, ranks, row_of, figures.once, bare)
        price = price_away(ranks, row_of, layer.row_prices, layer.groups[level])
        old.uncovered[level, expert] = figures.uncovered[level, expert]
        figures.uncovered[level, expert] = price * priced(bare, layer.segments, layer.token_prices)


@compiled_lean
def measure_saved(layer: Any, copies: Any, figures: Any, old: Any, concern: Any, rows: Any) -> None:
    """What replicated experts save by meeting, where that may be new."""
    count = 0
    last = layer.groups.size
    for place in range(1, copies.listed[0] + 1):
        expert = copies.listed[place]
        if not meets_changed(copies, expert, concern):
            continue
        concern.stale[last, count] = expert
        count += 1
        price = 0.0
        for i in range(copies.count[expert]):
            price += layer.row_prices[copies.ranks[expert, i]] / copies.count[expert]
        old.saved[expert] = figures.saved[expert]
        figures.saved[expert] = price * met(
            copies, expert, figures.bare, layer.groups[0], layer.segments, layer.token_prices,
            rows[0],
        )  # fmt: skip
    concern.num_stale[last] = count


@compiled_lean
def meets_changed(copies: Any, expert: int, concern: Any) -> Any:
    """Whether what `met` says of an expert may be new."""
    mask = copies.mask[expert]
    for i in range(concern.num_stale[0]):
        other = concern.stale[0, i]
        if other == expert or (other < expert and common_ranks(mask, copies.mask[other]) > 0):
            return True
    for i in range(2):
        if 0 <= concern.changed[i] < expert and common_ranks(mask, concern.masks[i]) > 0:
            return True
    return False


@compiled_lean
def measure_load(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, scratch: Any, slots: Any,
    num_touched: int, steering: float,
) -> Any:  # fmt: skip
    """The price of the imbalance of all scenarios."""
    width = slots.size // layer.groups[0]
    cost = 0.0
    for scenario in range(layer.loads.shape[0]):
        if layer.load_prices[scenario] == 0:
            continue
        loads, single = layer.loads[scenario], figures.single[scenario]
        for i in range(num_touched):
            rank = concern.touched[i]
            total = 0.0
            for slot in range(rank * width, (rank + 1) * width):
                if slots[slot] >= 0 and copies.count[slots[slot]] == 1:
                    total += loads[slots[slot]]
            old.single[scenario, rank] = single[rank]
            single[rank] = total / layer.fair[rank]
        load = scratch.rank_load
        fill_load(
            loads, single, layer.tokens, copies, figures.exclusive, layer.fair, steering,
            scratch.split, scratch.pull, load,
        )  # fmt: skip
        cost += layer.load_prices[scenario] * unevenness(load, layer.fair)
    return cost


@compiled_lean
def undo(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, slots: Any, slot_a: int,
    slot_b: int, num_touched: int,
) -> None:  # fmt: skip
    """Take the last proposal back."""
    width = slots.size // layer.groups[0]
    expert_a, expert_b = concern.changed
    slots[slot_a] = expert_a
    rank_a, rank_b = slot_a // width, np.int64(-1)
    if slot_b >= 0:
        slots[slot_b] = expert_b
        rank_b = slot_b // width
    move_copy(copies, expert_a, rank_b, rank_a)
    move_copy(copies, expert_b, rank_a, rank_b)
    for i in range(num_touched):
        rank = concern.touched[i]
        for level in range(layer.groups.size):
            row = layer.row_of[level, rank]
            figures.row_cost[row] = old.row_cost[row]
            copy_row(old.once[row], figures.once[row])
        for scenario in range(figures.single.shape[0]):
            figures.single[scenario, rank] = old.single[scenario, rank]
    for level in range(layer.groups.size):
        for i in range(concern.num_stale[level]):
            expert = concern.stale[level, i]
            figures.uncovered[level, expert] = old.uncovered[level, expert]
            if level == 0:
                copy_row(old.bare[expert], figures.bare[expert])
                copy_row(old.exclusive[expert], figures.exclusive[expert])
    last = layer.groups.size
    for i in range(concern.num_stale[last]):
        expert = concern.stale[last, i]
        figures.saved[expert] = old.saved[expert]

"""Kernel: simulated annealing of one layer with redundant slots, on token bitsets.

What a placement costs is what `solvers.replica_pricing` says. A proposal recomputes the rows of the
ranks that it touches, and the replicated experts there:
O((slots_per_rank + copies there) T / 64 + copies of all replicated experts).

Two in three proposals are refused after the rows, which are a third of the work: what they and the
loads of single-copy experts come to is known by then, and the rest, about replicated experts,
seldom makes up for much. How much it does is learnt while annealing: a margin beyond which one in
50 of those that would be accepted lies, held there by measuring one in 16 of those beyond it all
the same (stochastic approximation of a quantile: Robbins and Monro, 1951).

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
    change_row,
    copy_row,
    count_exclusive,
    cover_ranks,
    cover_single,
    differ,
    exchange_row,
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
# What rows, experts and ranks come to: once [R, W] tokens that a row's single-copy experts cover;
# twice [R, W] those that two of them, or two of a node's ranks, cover in the state that the anneal
# is in; row_cost [R]; bare [E, W] free tokens of a replicated expert, exclusive [E, G] tokens that
# only one copy covers, uncovered [levels, E] what the free ones cost, saved [E] what they save by
# meeting; single [C, G] load of single-copy experts over the mean and a rank's fair share;
# believed [C, G] load of each rank in the state that the anneal is in.
Figures = namedtuple(
    "Figures", "once twice row_cost bare exclusive uncovered saved single believed"
)
# What a proposal concerns: touched [G] ranks, mark [R] the last step that changed the row; leaving,
# arriving [G] the expert that a touched rank loses or gets as a single-copy one, E = none; changed
# [2] experts, -1 = none; of these num_were [2] copies before, were [2, C] where, masks [2, M] as
# bits; stale [levels + 1, E] experts to be measured again at each level, at last those whose
# savings are; num_stale [levels + 1].
Concern = namedtuple(
    "Concern", "touched mark leaving arriving changed num_were were masks stale num_stale"
)
# screen [2, 2] of proposals about single-copy experts only, and others: margin that the rest may
# make up for, and how much the rest changes on average
Scratch = namedtuple("Scratch", "rows rank_load split pull screen")

KEPT, RATE, MEASURED = 0.98, 0.03, 16  # of the screen, see the module's docstring
UNSCREENED, SPREAD_RATE = 100, 0.002  # steps before the first margin


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
        np.zeros(num_ranks, np.int64),
        np.zeros(num_ranks, np.int64),
        np.full(2, -1, np.int64),
        np.zeros(2, np.int64),
        np.zeros((2, most), np.int64),
        np.zeros((2, copies.mask.shape[1]), np.uint64),
        np.zeros((levels + 1, num_experts), np.int64),
        np.zeros(levels + 1, np.int64),
    )
    scratch = Scratch(
        np.zeros((2, words), np.uint64),
        np.zeros((loads.shape[0], num_ranks), np.float64),
        np.zeros((num_experts, most), np.float64),
        np.zeros(most, np.float64),
        np.array([[1e300, 0.0], [1e300, 0.0]]),
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
        np.zeros((num_rows, words), np.uint64),
        np.zeros(num_rows, np.float64),
        np.zeros((num_experts, words), np.uint64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((levels, num_experts), np.float64),
        np.zeros(num_experts, np.float64),
        np.zeros((num_scenarios, num_ranks), np.float64),
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
    settle_rows(layer, copies, figures, concern, slots, num_ranks)
    rows = 0.0
    for row in range(figures.row_cost.size):
        price_row(layer, figures, row)
        rows += figures.row_cost[row]
    measure_single(layer, copies, figures, old, concern, slots, num_ranks)
    others, load = measure_rest(layer, copies, figures, old, concern, scratch, 0, steering, 1e300)
    copy_loads(scratch.rank_load, figures.believed)
    cost = rows + others + load + move_price * moves
    best = cost
    for step in range(1, proposals + 1):
        if step & 63 == 1 and stop[0] != 0:
            break
        temperature *= cooling
        slot_a, slot_b, num_touched, moved = proposed(layer, copies, concern, slots, state, step)
        if slot_a < 0:
            continue
        allowed = cost - temperature * np.log(uniform(state) + 1e-300)
        new_rows = measure_rows(layer, figures, old, concern, step, num_touched)
        measure_single(layer, copies, figures, old, concern, slots, num_touched)
        spent = new_rows + move_price * (moves + moved)
        load = guessed_load(layer, copies, figures, old, concern, scratch.rank_load)
        excess = spent + load + others - allowed
        screen = scratch.screen[about_replicas(copies, concern)]
        if refused(screen, excess, state):
            concern.num_stale[:] = 0
            undo(layer, copies, figures, old, concern, slots, slot_a, slot_b, num_touched)
            continue
        new_others, new_load = measure_rest(
            layer, copies, figures, old, concern, scratch, step, steering, allowed - spent
        )
        new_cost = spent + new_others + new_load
        learn(screen, excess, new_cost - allowed, step)
        if new_cost > allowed:
            undo(layer, copies, figures, old, concern, slots, slot_a, slot_b, num_touched)
            continue
        cost, others = new_cost, new_others
        settle_rows(layer, copies, figures, concern, slots, num_touched)
        copy_loads(scratch.rank_load, figures.believed)
        moves += moved
        if cost < best - 1e-12:
            best = cost
            copy_row(slots, best_slots)
    return best


@compiled_lean
def about_replicas(copies: Any, concern: Any) -> Any:
    """1 if a changed expert has or had several copies, 0 if not."""
    for i in range(2):
        expert = concern.changed[i]
        if expert >= 0 and (concern.num_were[i] > 1 or copies.count[expert] > 1):
            return 1
    return 0


@compiled_lean
def refused(screen: Any, excess: float, state: Any) -> Any:
    """Whether a proposal is refused unmeasured: the rest would have to make up for `excess`."""
    return excess > screen[0] and below(state, MEASURED) != 0


@compiled_lean
def learn(screen: Any, excess: float, measured: float, step: int) -> None:
    """From a proposal that was measured: how much it exceeds what is allowed, and seemed to."""
    rate = 1.0 / step if screen[0] >= 1e300 else SPREAD_RATE
    screen[1] += rate * (abs(measured - excess) - screen[1])
    if screen[0] >= 1e300:
        if step >= UNSCREENED:
            screen[0] = 0.5 * screen[1]
    elif measured <= 0:
        kept = excess <= screen[0]
        screen[0] += RATE * screen[1] * (KEPT - 1.0 if kept else KEPT * MEASURED)


@compiled_lean
def copy_loads(source: Any, target: Any) -> None:
    for scenario in range(source.shape[0]):
        copy_row(source[scenario], target[scenario])


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
            copy_row(copies.ranks[expert], concern.were[i])
            concern.num_were[i] = copies.count[expert]
            num_touched = touch_single(copies, expert, step, concern, num_touched, concern.leaving)
            moved -= misplaced(copies, expert, layer.held)
    move_copy(copies, expert_a, rank_a, rank_b)
    move_copy(copies, expert_b, rank_b, rank_a)
    slots[slot_a] = expert_b
    if slot_b >= 0:
        slots[slot_b] = expert_a
    for i in range(2):
        expert = concern.changed[i]
        if expert >= 0:
            num_touched = touch_single(copies, expert, step, concern, num_touched, concern.arriving)
            moved += misplaced(copies, expert, layer.held)
    return slot_a, slot_b, num_touched, moved


@compiled_lean
def touch_single(
    copies: Any, expert: int, step: int, concern: Any, num_touched: int, change: Any
) -> Any:
    """Note the change [G] at the rank of a single-copy expert; the new number of ranks."""
    if copies.count[expert] != 1:
        return num_touched
    rank = copies.ranks[expert, 0]
    if concern.mark[rank] != step:
        concern.mark[rank] = step
        concern.leaving[rank] = copies.count.size
        concern.arriving[rank] = copies.count.size
        concern.touched[num_touched] = rank
        num_touched += 1
    change[rank] = expert
    return num_touched


@compiled_lean
def misplaced(copies: Any, expert: int, held: Any) -> Any:
    """How many of an expert's copies are moves."""
    count = 0
    for i in range(copies.count[expert]):
        if not held[expert, copies.ranks[expert, i]]:
            count += 1
    return count


@compiled_lean
def measure_rows(
    layer: Any, figures: Any, old: Any, concern: Any, step: int, num_touched: int
) -> Any:
    """Measure the rows of touched ranks and of their nodes; the price of all rows."""
    for i in range(num_touched):
        rank = concern.touched[i]
        old.row_cost[rank] = figures.row_cost[rank]
        leaving, arriving = layer.bits[concern.leaving[rank]], layer.bits[concern.arriving[rank]]
        exchange_row(figures.once[rank], figures.twice[rank], leaving, arriving, old.once[rank])
        price_row(layer, figures, rank)
    for level in range(1, layer.groups.size):
        rows = layer.row_of[level]
        for i in range(num_touched):
            rank = concern.touched[i]
            row = rows[rank]
            first, last = of_row(rows, concern, num_touched, row)
            if first != i:
                continue
            old.row_cost[row] = figures.row_cost[row]
            covered, before = figures.once[row], old.once[row]
            if first == last:
                changed = change_row(
                    covered, figures.twice[row], old.once[rank], figures.once[rank], before
                )
            else:
                copy_row(covered, before)
                cover_ranks(figures.once, rows, row, covered, old.twice[row])
                changed = differ(covered, before)
            if changed:
                concern.mark[row] = step
                price_row(layer, figures, row)
    cost = 0.0
    for row in range(figures.row_cost.size):
        cost += figures.row_cost[row]
    return cost


@compiled_lean
def of_row(rows: Any, concern: Any, num_touched: int, row: int) -> Any:
    """The first and the last place of a touched rank whose row [G] is this one."""
    first, last = num_touched, -1
    for i in range(num_touched):
        if rows[concern.touched[i]] == row:
            first = min(first, i)
            last = i
    return first, last


@compiled_lean
def price_row(layer: Any, figures: Any, row: int) -> None:
    covered = priced(figures.once[row], layer.segments, layer.token_prices)
    figures.row_cost[row] = layer.row_prices[row] * covered


@compiled_lean
def settle_rows(
    layer: Any, copies: Any, figures: Any, concern: Any, slots: Any, num_touched: int
) -> None:
    """Cover the rows of touched ranks and of their nodes anew, and twice."""
    width = slots.size // layer.groups[0]
    for i in range(num_touched):
        rank = concern.touched[i]
        once, twice = figures.once[rank], figures.twice[rank]
        cover_single(layer.bits, slots, copies.count, rank * width, width, once, twice)
    for level in range(1, layer.groups.size):
        rows = layer.row_of[level]
        for i in range(num_touched):
            row = rows[concern.touched[i]]
            if of_row(rows, concern, num_touched, row)[0] == i:
                cover_ranks(figures.once, rows, row, figures.once[row], figures.twice[row])


@compiled_lean
def measure_rest(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, scratch: Any, step: int,
    steering: float, allowed: float,
) -> Any:  # fmt: skip
    """Measure the replicated experts that a proposal concerns, and the load; all at step 0.

    Args:
        allowed: sum above which the proposal is refused; it need not be exact there.

    Returns:
        What the tokens of replicated experts cost, and the imbalance.
    """
    levels = layer.groups.size
    for level in range(levels):
        rows, stale = layer.row_of[level], concern.stale[level]
        concern.num_stale[level] = find_stale(copies, rows, concern, step, stale)
    measure_level(layer, copies, figures, old, concern, scratch.rows, 0)
    measure_saved(layer, copies, figures, old, concern, scratch.rows)
    cost = 0.0
    for place in range(1, copies.listed[0] + 1):
        expert = copies.listed[place]
        cost += figures.uncovered[0, expert] - figures.saved[expert]
    load = measure_load(layer, copies, figures, scratch, steering)
    # nodes last, and not at all where the rest is too much already
    for level in range(1, levels):
        known = 0
        for place in range(1, copies.listed[0] + 1):
            expert = copies.listed[place]
            if known < concern.num_stale[level] and concern.stale[level, known] == expert:
                known += 1
            else:
                cost += figures.uncovered[level, expert]
        count = concern.num_stale[level]
        if cost + load > allowed:
            concern.num_stale[level] = 0
        measure_level(layer, copies, figures, old, concern, scratch.rows, level)
        for i in range(count):
            cost += figures.uncovered[level, concern.stale[level, i]]
    return cost, load


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
def measure_single(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, slots: Any, num_touched: int
) -> None:
    """The load of single-copy experts on touched ranks, in all scenarios."""
    width = slots.size // layer.groups[0]
    for scenario in range(layer.loads.shape[0]):
        loads, single = layer.loads[scenario], figures.single[scenario]
        copy_row(single, old.single[scenario])
        for i in range(num_touched):
            rank = concern.touched[i]
            total = 0.0
            for slot in range(rank * width, (rank + 1) * width):
                if slots[slot] >= 0 and copies.count[slots[slot]] == 1:
                    total += loads[slots[slot]]
            single[rank] = total / layer.fair[rank]


@compiled_lean
def guessed_load(
    layer: Any, copies: Any, figures: Any, old: Any, concern: Any, rank_load: Any
) -> Any:
    """The price of imbalance if only changed experts counted, in equal shares for their copies."""
    cost = 0.0
    for scenario in range(layer.loads.shape[0]):
        if layer.load_prices[scenario] == 0:
            continue
        load, believed = rank_load[scenario], figures.believed[scenario]
        single, before = figures.single[scenario], old.single[scenario]
        for rank in range(load.size):
            load[rank] = believed[rank] + single[rank] - before[rank]
        for i in range(2):
            expert = concern.changed[i]
            if expert < 0:
                continue
            whole = layer.loads[scenario, expert]
            count, now = concern.num_were[i], copies.count[expert]
            for place in range(count if count > 1 else 0):
                rank = concern.were[i, place]
                load[rank] -= whole / count / layer.fair[rank]
            for place in range(now if now > 1 else 0):
                rank = copies.ranks[expert, place]
                load[rank] += whole / now / layer.fair[rank]
        cost += layer.load_prices[scenario] * unevenness(load, layer.fair)
    return cost


@compiled_lean
def measure_load(layer: Any, copies: Any, figures: Any, scratch: Any, steering: float) -> Any:
    """The price of the imbalance of all scenarios."""
    cost = 0.0
    for scenario in range(layer.loads.shape[0]):
        if layer.load_prices[scenario] == 0:
            continue
        load = scratch.rank_load[scenario]
        fill_load(
            layer.loads[scenario], figures.single[scenario], layer.tokens, copies,
            figures.exclusive, layer.fair, steering, scratch.split, scratch.pull, load,
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
        copy_row(old.single[scenario], figures.single[scenario])
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

"""Kernels: what a layer with replicas costs in messages and load, on token bitsets.

An expert with one copy is served there. A token that uses an expert with several copies is served
at home if a copy is there, else on a rank that it uses anyway for a single-copy expert, else on the
least loaded copy. So an expert with C copies costs no message for tokens that some copy's rank
covers, and one message for the share 1 - C / G of the others; what is free to go to any copy
prefers the less loaded ranks. It does not fill them up: a home knows no more than what it sent in
this batch, so that its preference is weak where batches are small (`steering`, see
docs/solvers.md). Where copies go, and which tokens they serve, is thus priced together.

Two free experts of a token meet on one rank where both have a copy, if the first happens to choose
it: with C, D copies, n of them on common ranks, for the share n (1 / C + 1 / D) / 2 of the tokens
whose home has neither, which is 1 - (C + D - n) / G. That saves a message; once per expert.

Shape letters: E experts, G ranks, T tokens, W = ceil(T / 64) words, C copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.anneal import popcount
from solvers.compiling import compiled_lean
from solvers.copies import common_ranks

SWEEPS, DAMPING = 2, 0.7  # with which the split of free tokens is found


@compiled_lean
def copy_row(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = source[i]


@compiled_lean
def differ(row: Any, other: Any) -> Any:
    found = np.uint64(0)
    for i in range(row.size):
        found |= row[i] ^ other[i]
    return found != 0


@compiled_lean
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


@compiled_lean
def taken(left: Any, tokens: Any, segments: Any, token_prices: Any) -> Any:
    """Price of one message of each token in both rows [W]; left loses them."""
    total = 0.0
    for workload in range(token_prices.size):
        first, last = segments[workload], segments[workload + 1]
        part, gone = left[first:last], tokens[first:last]
        count = np.int64(0)
        for w in range(part.size):
            count += np.int64(popcount(part[w] & gone[w]))
            part[w] &= ~gone[w]
        total += token_prices[workload] * count
    return total


@compiled_lean
def cover_single(
    bits: Any, slots: Any, count: Any, first: int, width: int, once: Any, twice: Any
) -> None:
    """Fill once, twice [W]: tokens with one, two single-copy experts in `width` slots."""
    for w in range(once.size):
        once[w] = 0
        twice[w] = 0
    for slot in range(first, first + width):
        expert = slots[slot]
        if expert >= 0 and count[expert] == 1:
            add_row(bits[expert], once, twice)


@compiled_lean
def cover_ranks(once: Any, row_of: Any, row: int, node: Any, twice: Any) -> None:
    """Fill node, twice [W]: tokens in one, in two of the rows of once whose rank's row is `row`."""
    for w in range(node.size):
        node[w] = 0
        twice[w] = 0
    for rank in range(row_of.size):
        if row_of[rank] == row:
            add_row(once[rank], node, twice)


@compiled_lean
def add_row(row: Any, once: Any, twice: Any) -> None:
    for w in range(row.size):
        twice[w] |= once[w] & row[w]
        once[w] |= row[w]


@compiled_lean
def exchange_row(once: Any, twice: Any, leaving: Any, arriving: Any, before: Any) -> None:
    """Cover once [W] without one expert's tokens and with another's; fill before with what it was.

    Args:
        twice: [W] tokens that two experts covered.
    """
    for w in range(once.size):
        covered = once[w]
        before[w] = covered
        once[w] = (covered & ~(leaving[w] & ~twice[w])) | arriving[w]


@compiled_lean
def change_row(once: Any, twice: Any, part: Any, new_part: Any, before: Any) -> Any:
    """Likewise a union once [W] of which one part is a new one; whether that changes anything."""
    found = np.uint64(0)
    for w in range(once.size):
        covered = once[w]
        before[w] = covered
        kept = covered & (~part[w] | twice[w]) | new_part[w]
        once[w] = kept
        found |= covered ^ kept
    return found != 0


@compiled_lean
def free_tokens(row: Any, ranks: Any, row_of: Any, once: Any, bare: Any) -> None:
    """Fill bare [W]: tokens of row [W] that no group of some ranks covers.

    Args:
        ranks: of an expert's copies.
        row_of: [G] row of each rank's group.
        once: [rows, W] tokens that each group covers.
    """
    for w in range(row.size):
        bare[w] = row[w]
    for i in range(ranks.size):
        group = once[row_of[ranks[i]]]
        for w in range(row.size):
            bare[w] &= ~group[w]


@compiled_lean
def count_exclusive(row: Any, ranks: Any, once: Any, scratch: Any, exclusive: Any) -> None:
    """Fill exclusive [G], at an expert's ranks: of tokens row [W], those that only this one covers.

    Args:
        once: [G or more, W] tokens that each rank covers.
        scratch: [2, W] uint64.
    """
    covered, twice = scratch[0], scratch[1]
    for w in range(row.size):
        covered[w] = 0
        twice[w] = 0
    for i in range(ranks.size):
        group = once[ranks[i]]
        for w in range(row.size):
            twice[w] |= covered[w] & group[w]
            covered[w] |= group[w]
    for i in range(ranks.size):
        group = once[ranks[i]]
        only = np.int64(0)
        for w in range(row.size):
            only += np.int64(popcount(row[w] & group[w] & ~twice[w]))
        exclusive[ranks[i]] = only


@compiled_lean
def price_away(ranks: Any, row_of: Any, row_prices: Any, num_groups: int) -> Any:
    """What a message to one of an expert's ranks costs, for the homes in other groups than theirs.

    In units of what it costs a single-copy expert's token, some of which are at home too.
    """
    total = 0.0
    apart = 0
    for i in range(ranks.size):
        row = row_of[ranks[i]]
        total += row_prices[row]
        fresh = True
        for j in range(i):
            fresh = fresh and row_of[ranks[j]] != row
        if fresh:
            apart += 1
    homeless = (1.0 - apart / num_groups) / (1.0 - 1.0 / num_groups)
    return homeless * total / ranks.size


@compiled_lean
def met(
    copies: Any, expert: int, bare: Any, num_ranks: int, segments: Any, token_prices: Any,
    left: Any,
) -> Any:  # fmt: skip
    """Messages saved since a free token's other expert has chosen a rank with a copy of this one.

    Others are those with lower numbers; that of several the first counts is an approximation.

    Args:
        bare: [E, W] free tokens of each replicated expert.
        left: [W] scratch.
    """
    saved = 0.0
    count = copies.count[expert]
    fresh = True
    for place in range(1, copies.listed[0] + 1):
        other = copies.listed[place]
        if other >= expert:
            break
        common = common_ranks(copies.mask[expert], copies.mask[other])
        if common == 0:
            continue
        if fresh:
            copy_row(bare[expert], left)
            fresh = False
        chosen = 0.5 * common * (1.0 / count + 1.0 / copies.count[other])
        homeless = 1.0 - (count + copies.count[other] - common) / num_ranks
        saved += chosen * max(0.0, homeless) * taken(left, bare[other], segments, token_prices)
    return saved / (1.0 - 1.0 / num_ranks)


@compiled_lean
def fill_load(
    load: Any, single: Any, tokens: Any, copies: Any, exclusive: Any, fair: Any, steering: float,
    split: Any, pull: Any, rank_load: Any,
) -> None:  # fmt: skip
    """Fill rank_load [G], in units of the mean and of each rank's fair share (see the module).

    Args:
        single: [G] what single-copy experts make of it.
        exclusive: [E, G] tokens that only this rank's copy covers.
        steering: how strongly free tokens prefer ranks with less load, see `solvers.layers`.
        split: [E, C] scratch: the load that each copy gets of tokens that are free to choose.
        pull: [C] scratch.
    """
    num_ranks = rank_load.size
    for rank in range(num_ranks):
        rank_load[rank] = single[rank]
    for place in range(1, copies.listed[0] + 1):
        expert = copies.listed[place]
        count = copies.count[expert]
        away = 1.0 - count / num_ranks
        known = max(tokens[expert], 1)
        bound = 0.0
        for i in range(count):
            bound += exclusive[expert, copies.ranks[expert, i]] / known
        free = load[expert] * away * max(0.0, 1.0 - bound) / count
        for i in range(count):
            rank = copies.ranks[expert, i]
            share = away * exclusive[expert, rank] / known + 1.0 / num_ranks
            split[expert, i] = free
            rank_load[rank] += (load[expert] * share + free) / fair[rank]
    for _ in range(SWEEPS):
        for place in range(1, copies.listed[0] + 1):
            expert = copies.listed[place]
            count = copies.count[expert]
            lowest = 1e300
            free = 0.0
            for i in range(count):
                lowest = min(lowest, rank_load[copies.ranks[expert, i]])
                free += split[expert, i]
            if free <= 0.0:
                continue
            total = 0.0
            for i in range(count):
                above = rank_load[copies.ranks[expert, i]] - lowest
                pull[i] = np.exp(-steering * above) if above > 0.0 else 1.0
                total += pull[i]
            for i in range(count):
                change = DAMPING * (free * pull[i] / total - split[expert, i])
                split[expert, i] += change
                rank = copies.ranks[expert, i]
                rank_load[rank] += change / fair[rank]

"""Exact optima for few experts: flow between layers, and co-activation within one.

Flow. The names of ranks do not matter to one layer, so a layer is one of the

    E! / (s!^G G!)      unlabelled partitions of E experts into G groups of s = E / G

and two neighbouring layers are worth the best matching of their groups (an assignment problem).
Dynamic programming over the layers is then exact: any labels of one layer extend to the next. 8
experts on 2 ranks: 35 partitions, on 4: 105; 12 on 2: 462; 10 on 5: 945; 16 on 2: 6435.

Co-activation. Layers are independent. Depth-first search gives the experts of a layer, those with
most co-activation first, to groups, never to more than one empty group (so each partition is met
once); a branch ends where what is kept, plus for each expert left the s - 1 pairs with earlier
experts that it would most like to keep, does not exceed the best known.

Complexity: O(L P^2 (E G + matching)) for P partitions; the search is exponential, and ends without
a proof at a number of nodes. Source: placer.
"""

from __future__ import annotations

from math import comb, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.compiling import compiled

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]

MOST_WORK = 4e9  # elementary steps of the dynamic programming, each about a nanosecond
MOST_NODES = 20_000_000  # of the search of one layer
_CHUNK_WORK = 1e7


def num_partitions(num_experts: int, num_ranks: int) -> int:
    """Unlabelled partitions into groups of equal size."""
    size = num_experts // num_ranks
    return prod(comb(left * size - 1, size - 1) for left in range(1, num_ranks + 1))


def chain_work(num_layers: int, num_experts: int, num_ranks: int) -> float:
    """Elementary steps that `best_chain` takes."""
    pairs = float(min(num_partitions(num_experts, num_ranks), 10**100)) ** 2
    steps = 4 if num_ranks == 2 else num_experts * num_ranks + num_ranks**3
    return (num_layers - 1) * pairs * steps


def best_chain(flow: Floats, num_ranks: int, budget: Budget) -> Ranks | None:
    """[L, E] ranks that keep the most flow [L-1, E, E]; None if the budget ends before.

    The caller looks at `chain_work` first.
    """
    num_experts = flow.shape[1]
    every = _partitions(num_experts, num_ranks)
    work = chain_work(2, num_experts, num_ranks)
    chunks = np.array_split(every, max(1, min(len(every), round(work / _CHUNK_WORK))))
    value = np.zeros(len(every))
    arguments = []
    for between in np.ascontiguousarray(flow, np.float64):
        parts = []
        for seconds in chunks:
            if budget.expired():
                return None
            parts.append(_match(between, every, seconds, value, num_ranks))
        value = np.concatenate([best for best, _ in parts])
        arguments.append(np.concatenate([argument for _, argument in parts]))
    choice = [int(value.argmax())]
    for argument in reversed(arguments):
        choice.append(int(argument[choice[-1]]))
    return _matched(flow, every[choice[::-1]], num_ranks)


def _match(
    between: Floats, firsts: Ranks, seconds: Ranks, value: Floats, num_ranks: int
) -> tuple[Floats, Ranks]:
    """The best first partition before each second one: [seconds] value so far, and which.

    On two ranks, with x = 1 and -1 for the experts of one and of the other, what two partitions
    keep is (sum of flow + |x flow y|) / 2: a matrix product.
    """
    from solvers.assignment import match_partitions

    if num_ranks == 2:
        kept = (1.0 - 2 * seconds) @ between.T @ (1.0 - 2 * firsts.T)
        np.abs(kept, out=kept)
        kept += 2 * value
        argument = kept.argmax(axis=1)
        best = (kept[np.arange(len(seconds)), argument] + float(between.sum())) / 2
        return best, argument
    sizes = np.full(num_ranks, firsts.shape[1] // num_ranks)
    forbidden = 1.0 + float(np.abs(between).sum())
    found: tuple[Floats, Ranks] = match_partitions(
        between, firsts, seconds, value, sizes, forbidden
    )
    return found


def _matched(flow: Floats, ranks: Ranks, num_ranks: int) -> Ranks:
    """The same partitions with each layer's groups named after the ones that they match before."""
    from solvers.assignment import assign, flow_between_ranks

    named = ranks.copy()
    for layer, between in enumerate(flow):
        total = flow_between_ranks(between, named[layer], ranks[layer + 1], num_ranks)
        match = assign(np.ascontiguousarray(total.T), np.ones(num_ranks, np.int64))
        named[layer + 1] = match[ranks[layer + 1]]
    return named


def _partitions(num_experts: int, num_ranks: int) -> Ranks:
    """[P, E] every unlabelled partition; groups named in the order of their first experts."""
    found = np.empty((num_partitions(num_experts, num_ranks), num_experts), np.int64)
    count = _enumerate(found, num_ranks)
    assert count == len(found)
    return found


def _enumerate_loop(found: Any, num_ranks: Any) -> Any:
    num_experts = found.shape[1]
    size = num_experts // num_ranks
    rank = np.full(num_experts, -1, np.int64)
    held = np.zeros(num_ranks, np.int64)
    count, depth = 0, 0
    while depth >= 0:
        if depth == num_experts:
            found[count] = rank
            count += 1
            depth -= 1
            continue
        current = rank[depth]
        if current >= 0:
            held[current] -= 1
        moved = False
        if current < 0 or held[current] > 0:  # no second empty group
            for group in range(current + 1, num_ranks):
                if held[group] < size:
                    rank[depth] = group
                    held[group] += 1
                    moved = True
                    break
        if moved:
            depth += 1
            if depth < num_experts:
                rank[depth] = -1
        else:
            rank[depth] = -1
            depth -= 1
    return count


def best_groups(together: Floats, num_ranks: int, known: Ranks, most_nodes: int) -> Ranks | None:
    """[E] ranks that keep the most co-activation; None if the search ended without a proof.

    Args:
        together: [E, E] symmetric; the diagonal does not matter.
        num_ranks: G; divides E.
        known: [E] ranks to beat.
        most_nodes: of the search.
    """
    pairs = together * (1.0 - np.eye(len(together)))
    order = np.argsort(-pairs.sum(axis=1), kind="stable")
    ranks = known[order].copy()
    weights = np.ascontiguousarray(pairs[np.ix_(order, order)])
    if not _search(weights, num_ranks, ranks, most_nodes):
        return None
    found = np.empty_like(ranks)
    found[order] = ranks
    return found


def _search_loop(weights: Any, num_ranks: Any, best_ranks: Any, most_nodes: Any) -> Any:
    num_experts = weights.shape[0]
    size = num_experts // num_ranks
    hope = np.zeros(num_experts + 1)  # of the experts from here on
    for expert in range(num_experts - 1, -1, -1):
        earlier = np.sort(weights[expert, :expert])[::-1]
        hope[expert] = hope[expert + 1] + earlier[: size - 1].sum()
    best = 0.0
    for i in range(num_experts):
        for j in range(i):
            if best_ranks[i] == best_ranks[j]:
                best += weights[i, j]
    margin = 1e-12 * hope[0]
    rank = np.full(num_experts, -1, np.int64)
    held = np.zeros(num_ranks, np.int64)
    kept = np.zeros(num_experts + 1)
    depth, nodes = 0, 0
    while depth >= 0:
        if depth == num_experts:
            if kept[depth] > best:
                best = kept[depth]
                best_ranks[:] = rank
            depth -= 1
            continue
        current = rank[depth]
        if current >= 0:
            held[current] -= 1
        moved = False
        if current < 0 or held[current] > 0:
            for group in range(current + 1, num_ranks):
                if held[group] == size:
                    continue
                gain = 0.0
                for other in range(depth):
                    if rank[other] == group:
                        gain += weights[depth, other]
                if kept[depth] + gain + hope[depth + 1] > best + margin:
                    nodes += 1
                    rank[depth] = group
                    held[group] += 1
                    kept[depth + 1] = kept[depth] + gain
                    moved = True
                    break
                if held[group] == 0:
                    break
        if moved:
            if nodes > most_nodes:
                return False
            depth += 1
            if depth < num_experts:
                rank[depth] = -1
        else:
            rank[depth] = -1
            depth -= 1
    return True


_enumerate = compiled(_enumerate_loop)
_search = compiled(_search_loop)

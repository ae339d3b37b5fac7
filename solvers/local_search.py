"""Joint local search over traffic and load, with a cap on imbalance.

Problem: place experts so that tokens meet few ranks (span), or, with coherent dispatch, so that
they also find an expert where the previous layer left them, while the busiest rank of a layer stays
close to the mean.

Method: a layer is annealed by swaps of two slots on exact token bitsets (`solvers.anneal`) under a
price mu on max / mean rank load: one price does better than a hard cap on every layer.

- alltoall: layers do not influence each other. Each is annealed under a ladder of prices, which
  yields a frontier of (traffic, imbalance) per layer; a multiple-choice knapsack then picks one
  candidate per layer so that the mean imbalance keeps the cap, and the layers are annealed again,
  longer and from several starts, around the price at which the knapsack settled.
- coherent: odd and even layers are annealed in turn against their neighbours while the temperature
  falls; between sweeps, the rank labels of each layer are matched to those of its neighbours by an
  assignment problem, which swaps cannot do. The price is searched for by bisection.

Complexity: O(L x proposals x T / 64) time, O(L x E x T / 64) words. No guarantee; deterministic
for a seed when no time limit cuts it short. Source: placer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import NoSolutionFound, Solution

# Prices of max / mean rank load, in messages per token and layer.
LADDER = (0.0, 0.1, 0.2, 0.4, 0.7, 1.2, 2.0, 4.0, 10.0, 40.0)
BALANCE_PRICE = 100.0
COHERENT_ROUNDS = 6
COHERENT_SWEEPS = 24
REFINE_STARTS = 2
# A proposal with replicas costs several times one without; fewer tokens do.
REPLICA_TOKENS = 16384

Words = NDArray[np.uint64]
Slots = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One placement of one layer: its slots [S], traffic per token, and max / mean rank load."""

    slots: Slots
    traffic: float
    imbalance: float


@dataclass(frozen=True, eq=False)
class Layers:
    """The problem as the kernels want it: a row of token bits per expert and layer.

    Attributes:
        bits, primary_bits: L arrays [E + 1, W].
        num_tokens: T; 0 when the problem has no tokens (then only load counts).
    """

    problem: Problem
    bits: list[Words]
    primary_bits: list[Words]
    num_tokens: int

    @property
    def coupled(self) -> bool:
        return self.problem.dispatch == "coherent" and self.num_tokens > 0

    @property
    def token_price(self) -> float:
        return 1.0 / max(1, self.num_tokens)

    @cached_property
    def relative(self) -> NDArray[np.float64]:
        """[L, E + 1] load in units of the mean rank load, a zero for the empty slot at the end."""
        load = self.problem.load
        mean = np.maximum(load.sum(axis=1, keepdims=True) / self.problem.num_ranks, 1e-300)
        return np.pad(load / mean, ((0, 0), (0, 1)))

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """Groups of slots at each level at which messages count: ranks, and nodes if they do."""
        problem = self.problem
        nodes = problem.num_nodes > 1 and problem.node_weight > 0
        return np.array([problem.num_ranks, problem.num_nodes][: 1 + nodes], np.int64)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """What a message costs at each level."""
        return np.array([1.0, self.problem.node_weight][: self.groups.size], np.float64)

    @property
    def heat(self) -> float:
        """First temperature, in messages per token: a fraction of what one swap moves."""
        problem = self.problem
        pairs = 0.0 if problem.tokens is None else float((problem.tokens >= 0).mean())
        used = pairs * (0 if problem.tokens is None else problem.tokens.shape[2])
        return 0.16 * used / problem.num_experts


def _prepare(problem: Problem) -> Layers:
    from solvers.anneal import pack_bits

    num_experts = problem.num_experts
    if problem.tokens is None or problem.dispatch == "allgather":
        none = np.zeros((num_experts + 1, 0), np.uint64)
        return Layers(problem, [none] * problem.num_layers, [none] * problem.num_layers, 0)
    tokens = problem.tokens
    primary = tokens[:, :, 0] if problem.primary is None else problem.primary
    if problem.num_slots > num_experts and problem.dispatch == "alltoall":
        tokens = tokens[:: -(-tokens.shape[0] // REPLICA_TOKENS)]
    bits = [
        pack_bits(np.ascontiguousarray(tokens[:, layer], dtype=np.int64), num_experts)
        for layer in range(problem.num_layers)
    ]
    primary_bits = bits
    if problem.dispatch == "coherent":
        primary_bits = [
            pack_bits(np.ascontiguousarray(primary[:, layer : layer + 1], np.int64), num_experts)
            for layer in range(problem.num_layers)
        ]
    return Layers(problem, bits, primary_bits, tokens.shape[0])


def _spread(problem: Problem) -> NDArray[np.int64]:
    """[S] contiguous experts, spare slots empty."""
    row = np.full((problem.num_ranks, problem.slots_per_rank), -1, np.int64)
    for rank, share in enumerate(np.array_split(np.arange(problem.num_experts), problem.num_ranks)):
        row[rank, : share.size] = share
    return row.reshape(-1)


def _cover(bits: Words, slots: Slots, groups: int) -> Words:
    """[groups, W] tokens with an expert in each of `groups` equal runs of slots."""
    from solvers.anneal import cover

    covered = np.zeros((groups, bits.shape[1]), np.uint64)
    scratch = np.zeros(bits.shape[1], np.uint64)
    width = slots.size // groups
    for group in range(groups):
        cover(bits, slots, group * width, (group + 1) * width, covered[group], scratch)
    return covered


def _cover_levels(layers: Layers, bits: Words, slots: Slots) -> Words:
    """[sum of groups, W] `_cover` at every level, stacked."""
    return np.concatenate([_cover(bits, slots, int(groups)) for groups in layers.groups])


def _imbalance(problem: Problem, layer: int, slots: Slots) -> float:
    load = np.append(problem.load[layer], 0.0)[slots].reshape(problem.num_ranks, -1).sum(axis=1)
    return float(load.max() / load.mean()) if load.any() else 1.0


def _span(layers: Layers, layer: int, slots: Slots) -> float:
    """Mean span of the layer, nodes included at their weight."""
    from solvers.anneal import count_bits

    covered = [count_bits(_cover(layers.bits[layer], slots, int(g))) for g in layers.groups]
    return float(layers.weights @ covered) * layers.token_price


def _anneal(
    layers: Layers,
    layer: int,
    slots: Slots,
    *,
    price: float,
    proposals: int,
    seed: Sequence[int],
    hot: float = 1.0,
    cold: float = 1.0 / 200,
    neighbours: tuple[Slots | None, Slots | None] = (None, None),
) -> Slots:
    """A copy of `slots`, annealed from hot to cold times the layer's own heat."""
    from solvers.anneal import anneal_layer

    problem = layers.problem
    bits = layers.bits[layer]
    primary_bits = home = next_once = None
    if layers.coupled:
        primary_bits = layers.primary_bits[layer]
        home = next_once = np.zeros((layers.groups.sum(), bits.shape[1]), np.uint64)
        before, after = neighbours
        if before is not None:
            home = _cover_levels(layers, layers.primary_bits[layer - 1], before)
        if after is not None:
            next_once = _cover_levels(layers, layers.bits[layer + 1], after)
    result = slots.copy()
    heat = layers.heat + 0.02 * price * problem.num_ranks / problem.num_experts
    once, twice = np.zeros((2, layers.groups.sum(), bits.shape[1]), np.uint64)
    anneal_layer(
        bits, layers.relative[layer], result, slots.copy(), once, twice,
        layers.groups, layers.weights, layers.token_price, price, 0.05 * price,
        hot * heat, (cold / hot) ** (1.0 / proposals), proposals,
        int(np.random.SeedSequence(list(seed)).generate_state(1)[0]),
        primary_bits, home, next_once,
    )  # fmt: skip
    return result


def _anneal_replicas(
    layers: Layers, layer: int, slots: Slots, *, price: float, proposals: int, seed: Sequence[int]
) -> Slots:
    """A copy of `slots`, annealed with its redundant slots filled."""
    from solvers.anneal_replicas import anneal_layer_replicas

    problem = layers.problem
    bits, relative = layers.bits[layer], layers.relative[layer]
    num_experts = problem.num_experts
    tokens = np.bitwise_count(bits[:num_experts]).sum(axis=1, dtype=np.int64)
    # an expert is drawn in proportion to its load, and once more
    draws = 1 + np.round(8 * relative[:num_experts] * num_experts / problem.num_ranks)
    hot = np.repeat(np.arange(num_experts), draws.astype(np.int64))
    result = slots.copy()
    heat = layers.heat + 0.02 * price * problem.num_ranks / num_experts
    anneal_layer_replicas(
        bits, relative, tokens, hot, result, layers.groups, layers.weights, layers.token_price,
        price, 0.05 * price, heat, (1 / 200) ** (1.0 / proposals), proposals,
        int(np.random.SeedSequence(list(seed)).generate_state(1)[0]), np.zeros(2),
    )  # fmt: skip
    return result


def _served(layers: Layers, layer: int, slots: Slots) -> Candidate:
    """What a layer with replicas costs when each token chooses its copies, as in a replay."""
    from solvers.anneal_replicas import serve_layer

    problem = layers.problem
    assert problem.tokens is not None
    home = problem.home
    if home is None:
        home = np.full(problem.tokens.shape[0], -1, np.int64)
    load = np.zeros(problem.num_ranks)
    messages, node_messages = serve_layer(
        np.ascontiguousarray(problem.tokens[:, layer]), slots, problem.num_experts,
        problem.num_ranks, problem.num_nodes, home, load,
    )  # fmt: skip
    traffic = (messages + problem.node_weight * node_messages) / problem.tokens.shape[0]
    return Candidate(slots, traffic, float(load.max() / load.mean()) if load.any() else 1.0)


def choose(
    pools: Sequence[Sequence[Candidate]], cap: float | None, floor: float = 0.0
) -> tuple[list[Candidate], float]:
    """One candidate per layer: least total traffic with mean imbalance at most `cap`.

    With a `floor` imbalance has that price in the first place: least traffic + floor x imbalance.

    Multiple-choice knapsack by its Lagrangian (bisection on the price, O(candidates) a step), the
    slack then filled greedily. When no choice keeps the cap, the least imbalance that there is.

    Returns:
        The choice, and the price of imbalance at which it was made.
    """

    def pick(price: float) -> list[Candidate]:
        return [min(pool, key=lambda c: c.traffic + price * c.imbalance) for pool in pools]

    def mean(choice: Iterable[Candidate]) -> float:
        return float(np.mean([c.imbalance for c in choice]))

    free = pick(floor)
    if cap is None or mean(free) <= cap:
        return free, floor
    tightest = [min(pool, key=lambda c: (c.imbalance, c.traffic)) for pool in pools]
    if mean(tightest) > cap:
        return tightest, BALANCE_PRICE
    low, high = floor, 1e6
    choice = tightest
    for _ in range(60):
        price = (low * high) ** 0.5 if low > 0 else min(high / 2, 1.0)
        tried = pick(price)
        if mean(tried) <= cap:
            high, choice = price, tried
        else:
            low = price
        if low > 0 and high / low < 1.001:
            break
    return (choice if floor > 0 else _fill(pools, choice, cap)), high


def _fill(
    pools: Sequence[Sequence[Candidate]], choice: list[Candidate], cap: float
) -> list[Candidate]:
    """Spend what the cap leaves on the exchanges that save most traffic per imbalance."""
    choice = list(choice)
    slack = cap * len(choice) - sum(c.imbalance for c in choice)
    exchanges = [
        (saved / max(cost, 1e-12), layer, candidate)
        for layer, pool in enumerate(pools)
        for candidate in pool
        if (saved := choice[layer].traffic - candidate.traffic) > 0
        and (cost := candidate.imbalance - choice[layer].imbalance) <= slack
    ]
    for _, layer, candidate in sorted(exchanges, key=lambda e: (-e[0], e[1])):
        cost = candidate.imbalance - choice[layer].imbalance
        if candidate.traffic < choice[layer].traffic and cost <= slack - 1e-12:
            choice[layer] = candidate
            slack -= cost
    return choice


def _proposals(problem: Problem) -> int:
    return 600 * max(32, problem.num_experts)


def _separable(layers: Layers, seed: int, budget: Budget, price: float | None) -> list[Slots]:
    """Solve layer by layer: `price` fixed, or found by the cap."""
    problem = layers.problem
    replicate = problem.num_slots > problem.num_experts and layers.num_tokens > 0
    start = _spread(problem)
    pools: list[list[Candidate]] = [[] for _ in range(problem.num_layers)]

    def candidate(layer: int, slots: Slots) -> Candidate:
        if replicate:
            return _served(layers, layer, slots)
        return Candidate(slots, _span(layers, layer, slots), _imbalance(problem, layer, slots))

    def run(job: tuple[int, float, int, int, Slots]) -> tuple[int, Candidate] | None:
        layer, mu, proposals, start_number, slots = job
        if budget.expired():
            return None
        key = (seed, layer, start_number, int(mu * 1000))
        anneal = _anneal_replicas if replicate else _anneal
        slots = anneal(layers, layer, slots, price=mu, proposals=proposals, seed=key)
        return layer, candidate(layer, slots)

    for layer in range(problem.num_layers):
        pools[layer].append(candidate(layer, start))
    long = _proposals(problem) // (2 if replicate else 1)
    floor, cap = price or 0.0, problem.max_imbalance
    # without a cap nothing but the price itself is of use
    higher = tuple(mu for mu in LADDER if mu > floor)
    ladder = (floor, *higher) if price is None or cap is not None else (floor,)
    with ThreadPoolExecutor(_available_cores()) as executor:

        def extend(prices: Sequence[float], proposals: int, starts: Iterable[int]) -> None:
            jobs = [
                (layer, mu, proposals, number, start)
                for number in starts
                for mu in prices
                for layer in range(problem.num_layers)
            ]
            for found in executor.map(run, jobs):
                if found is not None:
                    pools[found[0]].append(found[1])

        extend(ladder, long // 4, [0])
        _, settled = choose(pools, cap, floor)
        around = (settled / 1.6, settled, settled * 1.6) if settled > floor else (floor,)
        extend(around, long, range(1, 1 + REFINE_STARTS))
    if problem.objective == "balance":
        return [min(pool, key=lambda c: (c.imbalance, c.traffic)).slots for pool in pools]
    return [c.slots for c in choose(pools, cap, floor)[0]]


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _align(layers: Layers, placement: list[Slots]) -> list[Slots]:
    """Relabel the ranks of each layer so that most tokens find an expert where they are.

    With the neighbours fixed, the best labels of a layer are a linear assignment problem over ranks
    (over nodes first, then over the ranks of each node, when there are several nodes).
    """
    from scipy.optimize import linear_sum_assignment

    problem = layers.problem
    ranks, width = problem.num_ranks, problem.slots_per_rank
    placement = [slots.copy() for slots in placement]

    def gains(layer: int, groups: int) -> NDArray[np.int64]:
        """[groups here, label] tokens that would not move."""
        total = np.zeros((groups, groups), np.int64)
        here = _cover(layers.bits[layer], placement[layer], groups)
        if layer > 0:
            home = _cover(layers.primary_bits[layer - 1], placement[layer - 1], groups)
            total += np.bitwise_count(here[:, None] & home[None]).sum(axis=2, dtype=np.int64)
        if layer + 1 < problem.num_layers:
            leave = _cover(layers.primary_bits[layer], placement[layer], groups)
            after = _cover(layers.bits[layer + 1], placement[layer + 1], groups)
            total += np.bitwise_count(leave[:, None] & after[None]).sum(axis=2, dtype=np.int64)
        return total

    def relabel(layer: int, groups: int, order: NDArray[np.int64]) -> None:
        placement[layer] = placement[layer].reshape(groups, -1)[order].reshape(-1)

    for _ in range(2):
        for layer in range(problem.num_layers):
            if problem.num_nodes > 1:
                group, label = linear_sum_assignment(gains(layer, problem.num_nodes), maximize=True)
                relabel(layer, problem.num_nodes, group[np.argsort(label)])
            gain = gains(layer, ranks)
            for node in range(problem.num_nodes):
                inside = slice(node * problem.ranks_per_node, (node + 1) * problem.ranks_per_node)
                group, label = linear_sum_assignment(gain[inside, inside], maximize=True)
                block = placement[layer].reshape(ranks, width)[inside]
                block[:] = block[group[np.argsort(label)]]
    return placement


def _coherent_traffic(layers: Layers, placement: list[Slots]) -> float:
    """Mean over layers of 2 x span less 1 for each token that finds an expert where it is."""
    from solvers.anneal import count_bits

    total = 0.0
    for groups, weight in zip(layers.groups, layers.weights, strict=True):
        home: Words | None = None
        for layer, slots in enumerate(placement):
            here = _cover(layers.bits[layer], slots, int(groups))
            total += weight * 2 * count_bits(here)
            if home is not None:
                total -= weight * count_bits(here & home)
            home = _cover(layers.primary_bits[layer], slots, int(groups))
    return total * layers.token_price / len(placement)


def _coherent(layers: Layers, seed: int, budget: Budget, price: float | None) -> list[Slots]:
    """Anneal odd and even layers in turn; search for the price that meets the cap."""
    problem = layers.problem
    num_layers = problem.num_layers
    cap = problem.max_imbalance
    visited: list[tuple[float, float, float, list[Slots]]] = []

    def run(mu: float, number: int) -> float:
        """One anneal at price mu; returns its mean imbalance."""
        placement = [_spread(problem)] * num_layers
        steps = max(1, _proposals(problem) // COHERENT_SWEEPS)
        ratio = (1 / 300) ** (1 / COHERENT_SWEEPS)
        hot = 2.0
        for sweep in range(COHERENT_SWEEPS):
            for parity in (0, 1):
                if budget.expired():
                    break

                def job(
                    layer: int, now: list[Slots] = placement, hot: float = hot, sweep: int = sweep
                ) -> Slots:
                    return _anneal(
                        layers, layer, now[layer], price=mu, proposals=steps,
                        seed=(seed, layer, number, sweep), hot=hot, cold=hot * ratio,
                        neighbours=(
                            now[layer - 1] if layer > 0 else None,
                            now[layer + 1] if layer + 1 < num_layers else None,
                        ),
                    )  # fmt: skip

                moved = list(executor.map(job, range(parity, num_layers, 2)))
                placement = list(placement)
                placement[parity::2] = moved
            hot *= ratio
            if sweep % 3 == 2:
                placement = _align(layers, placement)
        placement = _align(layers, placement)
        imbalance = float(np.mean([_imbalance(problem, i, s) for i, s in enumerate(placement)]))
        visited.append((_coherent_traffic(layers, placement), imbalance, mu, placement))
        return imbalance

    with ThreadPoolExecutor(_available_cores()) as executor:
        floor = price or 0.0
        fixed = cap is None or (price is not None and run(price, COHERENT_ROUNDS) <= cap)
        if fixed:
            for number in range(REFINE_STARTS):
                if not budget.expired():
                    run(floor, number)
        else:
            assert cap is not None
            mu, low, high = max(2.0, 3 * floor), floor, float("inf")
            for number in range(COHERENT_ROUNDS):
                if budget.expired():
                    break
                if run(mu, number) <= cap:
                    high = min(high, mu)
                else:
                    low = max(low, mu)
                mu = (low * high) ** 0.5 if 0 < low < high < float("inf") else (
                    high / 3 if high < float("inf") else low * 3
                )  # fmt: skip
    if not visited:
        raise NoSolutionFound("the time limit passed before the first anneal ended")
    kept = [v for v in visited if cap is None or v[1] <= cap]
    if not kept:
        return min(visited, key=lambda v: v[1])[3]
    return min(kept, key=lambda v: v[0] + floor * v[1])[3]


@register("local_search", source="placer", replicates=True)
def local_search(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Anneals traffic, load and replicas together on exact token bitsets, under a cap on imbalance.

    Redundant slots are filled with replicas under alltoall dispatch (`solvers.anneal_replicas`);
    under coherent dispatch they only let ranks hold unequal numbers of experts.
    """
    layers = _prepare(problem)
    price: float | None = None
    if problem.objective == "balance" or layers.num_tokens == 0:
        price = BALANCE_PRICE
    elif problem.objective == "latency":
        used = float((problem.tokens >= 0).sum(axis=2).mean()) if problem.tokens is not None else 0
        per_message = max(problem.latency_message_us, 1e-12)
        price = problem.latency_load_us * used / per_message
    search = _coherent if layers.coupled else _separable
    placement = np.stack(search(layers, seed, budget, price))
    return Solution(placement, termination=budget.termination())

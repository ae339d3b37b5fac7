"""A problem as the annealing kernels want it, and what a placement of one layer costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from solvers.problem import Problem

# Tokens that the anneals see; a proposal with replicas costs several times one without. Candidates
# with replicas are judged on all of the problem's tokens, the others on these; results on all.
MOST_TOKENS, REPLICA_TOKENS = 32768, 16384

# A preference for less loaded copies per square root of what a home has seen (docs/solvers.md).
STEERING, MOST_STEERING = 0.47, 6.0

# Times as many proposals as usual; benchmarks raise it to see what they would bring.
EFFORT = 1

# The last of an anneal's heat, and from how many proposals for each pair of slots it is which.
COLD, LUKEWARM, OFTEN = 1 / 100, 1 / 20, 4

Words = NDArray[np.uint64]
Slots = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One placement of one layer.

    Attributes:
        slots: [S] expert of each slot, -1 = empty.
        traffic: [workloads] messages per token, at their prices; see `Layers.counts_homes`.
        imbalance: [workloads] max / mean rank load, averaged over the workload's scenarios; with
            folds over what is left of the workload without each, or over halves of it.
        moves: copies on ranks that did not hold them.
        width: slots per rank that the layer was given.
    """

    slots: Slots
    traffic: Floats
    imbalance: Floats
    moves: int
    width: int


@dataclass(frozen=True)
class Prices:
    """What a layer is annealed for.

    Attributes:
        traffic: weight of each workload's messages; they sum to 1.
        imbalance: price of each workload's max / mean rank load, in messages per token.
        move, slot: price of a move, and of another slot per rank.
    """

    traffic: tuple[float, ...]
    imbalance: tuple[float, ...]
    move: float = 0.0
    slot: float = 0.0

    def scaled(self, factor: float) -> Prices:
        """With `factor` times the price of imbalance."""
        dearer = tuple(price * factor for price in self.imbalance)
        return Prices(self.traffic, dearer, self.move, self.slot)


@dataclass(frozen=True, eq=False)
class Layers:
    """Token bits and loads of every layer.

    Attributes:
        bits, primary_bits: L arrays [E + 1, words]; the tokens of a workload follow each other,
            and each workload begins with a new word.
        segments: [workloads + 1] first word of each workload, and the number of words.
        num_tokens: [workloads] tokens; all 0 when only load counts, and no token chooses copies.
        sample: [64 words] the problem's token that each bit stands for, -1 = none.
        most_proposals: of a long anneal, where there is no time for more.
        stop: [1] not 0 once the kernels shall end.
    """

    problem: Problem
    bits: list[Words]
    primary_bits: list[Words]
    segments: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    sample: NDArray[np.int64]
    most_proposals: int | None = None
    stop: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def has_tokens(self) -> bool:
        return bool(self.num_tokens.any())

    @property
    def coupled(self) -> bool:
        """Whether neighbouring layers matter to each other."""
        return self.problem.dispatch == "coherent" and self.has_tokens

    @property
    def replicates(self) -> bool:
        """Whether there are slots to spare and tokens to choose copies."""
        problem = self.problem
        return problem.num_slots > problem.num_experts and self.has_tokens and not self.coupled

    @cached_property
    def loads(self) -> Floats:
        """[L, C, E + 1] load in units of its scenario's mean rank load, 0 for an empty slot.

        For the anneals; candidates are judged by `judged_loads`. See `annealed` for folds.
        """
        problem = self.problem
        loads = problem.load[None] if problem.scenario_load is None else problem.scenario_load
        return self._relative(self.annealed(loads))

    @cached_property
    def judged_loads(self) -> Floats:
        """[L, R, E + 1] likewise, of what the cap on imbalance is about."""
        problem = self.problem
        if problem.scenario_load is None or not problem.folds:
            return self.loads
        return self._relative(problem.judged(problem.scenario_load))

    def _relative(self, loads: Floats) -> Floats:
        mean = np.maximum(loads.sum(axis=2, keepdims=True) / self.problem.num_ranks, 1e-300)
        return np.ascontiguousarray(np.pad(loads / mean, ((0, 0), (0, 0), (0, 1))).swapaxes(0, 1))

    def annealed(self, loads: Floats) -> Floats:
        """[C', ...] the loads that layers are annealed for, from those of the scenarios [C, ...].

        Folds of a workload are one scenario: the chance of each is not worth chasing. Coupled
        layers are annealed for what is left without each fold as well, as they are judged: pressed
        to equal loads of the whole sample they are worse without a fold, and on other requests.
        """
        if not self.problem.folds:
            return loads
        whole: Floats = self.problem.of_workloads(loads)
        return np.concatenate([whole, self.problem.judged(loads)]) if self.coupled else whole

    @cached_property
    def workload(self) -> NDArray[np.int64]:
        """[C] workload of each row of `loads`."""
        problem = self.problem
        if not problem.folds:
            return problem.workload_of_scenarios
        whole = np.arange(problem.num_workloads)
        return np.append(whole, problem.workload_of_judged) if self.coupled else whole

    @cached_property
    def shares(self) -> Floats:
        """[C] what a row of `loads` counts for in its workload's imbalance; sum 1 for each."""
        if self.problem.folds and self.coupled:  # half the whole, half what is left without folds
            judged = self.problem.workload_of_judged
            parts = 0.5 / np.bincount(judged)
            return np.append(np.full(parts.size, 0.5), parts[judged])
        return 1.0 / np.bincount(self.workload)[self.workload]

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """Groups of slots at each level at which messages count: ranks, and nodes if they do."""
        problem = self.problem
        nodes = problem.num_nodes > 1 and problem.node_weight > 0 and problem.link_cost is None
        return np.array([problem.num_ranks, problem.num_nodes][: 1 + nodes], np.int64)

    @property
    def counts_homes(self) -> bool:
        """Whether traffic counts each rank that a token uses, also where that is its home."""
        exact = self.problem.link_cost is not None or self.replicates
        return not self.coupled and (self.problem.home is None or not exact)

    @cached_property
    def row_prices(self) -> Floats:
        """[sum of groups] what a message to each rank costs, and to each node.

        With `link_cost` a rank's price is the mean over the home ranks of the tokens; with coherent
        dispatch, where tokens have no lasting home, over all the other ranks. Where `counts_homes`,
        prices are those of a message over the share of ranks that are not the home.
        """
        problem = self.problem
        if problem.dispatch == "allgather":  # the same messages whatever the placement
            return np.zeros(int(self.groups.sum()))
        if problem.link_cost is not None:
            share = np.full(problem.num_ranks, 1 / max(1, problem.num_ranks - 1))
            if problem.home is not None and not self.coupled:
                count = np.bincount(problem.home, minlength=problem.num_ranks)
                share = count / count.sum()
            return np.ascontiguousarray(share @ problem.link_cost)
        node = problem.node_weight
        if self.counts_homes and self.groups.size > 1:  # nodes are home more often than ranks
            node *= (1 - 1 / problem.num_nodes) / (1 - 1 / problem.num_ranks)
        return np.repeat([1.0, node][: self.groups.size], self.groups)

    @cached_property
    def home_prices(self) -> Floats:
        """[G + 1, sum of groups] what a message costs from each home, the last one unknown."""
        problem = self.problem
        prices = np.tile(self.row_prices, (problem.num_ranks + 1, 1))
        known = problem.link_cost is not None and problem.home is not None
        if known and problem.dispatch != "allgather":
            prices[:-1] = problem.link_cost
        return prices

    @property
    def heat(self) -> float:
        """First temperature: a fraction of what one swap can save, at the dearest rank."""
        return self._heat_of(self.row_prices[: self.problem.num_ranks])

    @property
    def node_heat(self) -> float:
        """What the start is warmer by, for what a swap can save at the dearest node.

        Where layers matter for themselves and experts have one copy; elsewhere it brings nothing.
        """
        if self.coupled or self.replicates:
            return 0.0
        return self._heat_of(self.row_prices[self.problem.num_ranks :])

    def _heat_of(self, row_prices: Floats) -> float:
        return 0.16 * self.token_share * float(row_prices.max(initial=0.0))

    @cached_property
    def token_share(self) -> float:
        """Share of the tokens that a mean expert has in a layer."""
        tokens = self.problem.tokens
        if tokens is None:
            return 0.0
        return float((tokens >= 0).sum(axis=2).mean()) / self.problem.num_experts

    @cached_property
    def steering(self) -> float:
        """How strongly tokens with a choice of copies prefer the less loaded rank.

        A home sees the load of ranks in what it sent in the batch so far, on the mean n pairs a
        rank: a sample, with a noise of 1 / sqrt(n). Copies get shares as exp(-steering x load /
        mean).
        """
        problem = self.problem
        assert problem.tokens is not None
        count = len(problem.tokens)
        home = np.zeros(count, np.int64) if problem.home is None else problem.home
        batch = np.zeros(count, np.int64) if problem.batch is None else problem.batch
        _, cell, size = np.unique(
            batch * problem.num_ranks + home, return_inverse=True, return_counts=True
        )
        used = float((problem.tokens >= 0).sum(axis=2).mean())
        seen = float(size[cell].mean()) * used / problem.num_ranks / 2
        return min(MOST_STEERING, STEERING * float(np.sqrt(seen)))

    @property
    def proposals(self) -> int:
        """Of a long anneal of one layer."""
        usual = self.usual_proposals
        return usual if self.most_proposals is None else min(usual, self.most_proposals)

    @property
    def usual_proposals(self) -> int:
        """Of a long anneal where there is time for it."""
        return EFFORT * 600 * max(32, self.problem.num_experts)

    def heat_at(self, prices: Prices) -> float:
        """First temperature, where imbalance has a price too."""
        per_rank = self.problem.num_ranks / self.problem.num_experts
        return self.heat + 0.02 * sum(prices.imbalance) * per_rank

    def draws(self, layer: int) -> NDArray[np.int64]:
        """[H] experts to draw replicas from: in proportion to their load, and once more."""
        per_rank = self.problem.num_ranks / self.problem.num_experts
        times = 1 + np.round(8 * self.loads[layer].mean(axis=0)[:-1] / per_rank)
        return np.repeat(np.arange(self.problem.num_experts), times.astype(int))

    def uniform_prices(self, imbalance: float, move: float = 0.0) -> Prices:
        """Every workload alike."""
        count = self.num_tokens.size
        return Prices((1 / count,) * count, (imbalance / count,) * count, move)

    def held(self, layer: int) -> NDArray[np.bool_]:
        """[E + 1, G] whether an expert on a rank is no move; the last row is true."""
        problem = self.problem
        if problem.current is None:
            return np.ones((problem.num_experts + 1, problem.num_ranks), np.bool_)
        held = np.zeros((problem.num_experts + 1, problem.num_ranks), np.bool_)
        row = problem.current[layer]
        slot = np.nonzero(row >= 0)[0]
        held[row[slot], slot // problem.slots_per_rank] = True
        held[-1] = True
        return held

    def room(self, layer: int, width: int) -> NDArray[np.int64]:
        """[G] slots that each rank may fill when the layer gets `width` per rank."""
        room: NDArray[np.int64] = np.minimum(self.problem.slots_of_ranks[layer], width)
        return room

    def fewest(self, layer: int) -> int:
        """The least width at which a layer's experts have room and the pins are kept."""
        problem = self.problem
        fewest = -(-problem.num_experts // problem.num_ranks)
        if problem.pinned is not None:
            pinned = problem.pinned[layer]
            fewest = max(fewest, int(np.bincount(pinned[pinned >= 0], minlength=1).max()))
        while self.room(layer, fewest).sum() < problem.num_experts:
            fewest += 1
        return fewest

    def free(self, layer: int, slots: Slots, width: int) -> NDArray[np.int64]:
        """[F] slots that may change: not those beyond a rank's room, nor those with a pin."""
        problem = self.problem
        place = np.arange(slots.size) % problem.slots_per_rank
        rank = np.arange(slots.size) // problem.slots_per_rank
        free = place < self.room(layer, width)[rank]
        if problem.pinned is not None:
            wanted = np.append(problem.pinned[layer], -1)[slots]
            free &= wanted != rank
        return np.nonzero(free)[0]

    def spread(self, layer: int, width: int) -> Slots:
        """[S] experts in their order, as evenly as room and pins allow; spare slots empty."""
        problem = self.problem
        room = self.room(layer, width)
        pinned = np.full(problem.num_experts, -1)
        if problem.pinned is not None:
            pinned = problem.pinned[layer]
        count = np.bincount(pinned[pinned >= 0], minlength=problem.num_ranks)
        for _ in range(problem.num_experts - int(count.sum())):
            open_ranks = np.nonzero(count < room)[0]
            count[open_ranks[np.argmin(count[open_ranks])]] += 1
        rest = iter(np.nonzero(pinned < 0)[0].tolist())
        row = np.full((problem.num_ranks, problem.slots_per_rank), -1, np.int64)
        for rank in range(problem.num_ranks):
            here = np.nonzero(pinned == rank)[0].tolist()
            here += [next(rest) for _ in range(int(count[rank]) - len(here))]
            row[rank, : len(here)] = here
        return row.reshape(-1)

    def start(self, layer: int, width: int, *, replicas: bool | None = None) -> Slots:
        """The current placement, with the few changes that make it allowed; without one `spread`.

        Without `replicas` (unless said otherwise: where none are placed in one layer alone) an
        expert keeps one copy: the pinned one, or the first.
        """
        problem = self.problem
        if problem.current is None:
            return self.spread(layer, width)
        current = problem.current[layer]
        if not (self.replicates if replicas is None else replicas):
            current = self._one_copy_each(layer, current)
        rows = current.reshape(problem.num_ranks, -1)
        held = [row[row >= 0].tolist() for row in rows]
        if not self._made_allowed(layer, held, width):
            return self.spread(layer, width)
        packed = np.full(rows.shape, -1, np.int64)
        for rank, experts in enumerate(held):
            packed[rank, : len(experts)] = experts
        return packed.reshape(-1)

    def _made_allowed(self, layer: int, held: list[list[int]], width: int) -> bool:
        """Change what ranks hold by few moves until room and pins are kept; False if stuck."""
        problem = self.problem
        room = self.room(layer, width)
        pin = np.full(problem.num_experts, -1)
        if problem.pinned is not None:
            pin = problem.pinned[layer]
        count = np.bincount(np.concatenate(held).astype(int), minlength=problem.num_experts)

        def given_up(rank: int) -> int | None:
            """An expert that leaves a rank, rather one with another copy."""
            free = [expert for expert in held[rank] if pin[expert] != rank]
            if not free:
                return None
            expert = max(free, key=lambda e: count[e])
            held[rank].remove(expert)
            count[expert] -= 1
            return expert

        for rank in range(problem.num_ranks):
            while len(held[rank]) > room[rank]:
                expert = given_up(rank)
                if expert is None:
                    return False
                if count[expert] == 0:
                    space = [int(room[other]) - len(held[other]) for other in range(len(held))]
                    other = int(np.argmax(space))
                    if space[other] <= 0:
                        return False
                    held[other].append(expert)
                    count[expert] = 1
        for expert in np.nonzero(pin >= 0)[0].tolist():
            rank = int(pin[expert])
            if expert in held[rank]:
                continue
            source = next(other for other, experts in enumerate(held) if expert in experts)
            held[source].remove(expert)
            if len(held[rank]) >= room[rank]:
                victim = given_up(rank)
                if victim is None:
                    return False
                if count[victim] == 0:
                    held[source].append(victim)
                    count[victim] = 1
            held[rank].append(expert)
        return True

    def _one_copy_each(self, layer: int, slots: Slots) -> Slots:
        """[S] without replicas."""
        problem = self.problem
        rank = np.arange(slots.size) // problem.slots_per_rank
        order = np.arange(slots.size)
        if problem.pinned is not None:
            wanted = np.append(problem.pinned[layer], -1)[slots]
            order = np.argsort(wanted != rank, kind="stable")
        expert, first = np.unique(slots[order], return_index=True)
        kept = np.full(slots.size, -1, np.int64)
        kept[order[first[expert >= 0]]] = expert[expert >= 0]
        return kept

    def token_prices(self, prices: Prices) -> Floats:
        """[workloads] of one message of one token."""
        return np.array(prices.traffic) / np.maximum(1, self.num_tokens)

    def load_prices(self, prices: Prices) -> Floats:
        """[C] of each scenario's max / mean rank load."""
        return np.array(prices.imbalance)[self.workload] * self.shares

    def imbalance(self, layer: int, slots: Slots) -> Floats:
        """[workloads] what the cap is about, of a layer whose experts have a copy each."""
        num_ranks = self.problem.num_ranks
        rows = self.judged_loads[layer][:, slots].reshape(-1, num_ranks, slots.size // num_ranks)
        return self._imbalance(rows.sum(axis=2), self.problem.workload_of_judged)

    @property
    def balances_evenly(self) -> bool:
        """Whether the objective is the balance of copies that have equal shares of the load."""
        problem = self.problem
        asked = problem.objective == "balance" and problem.max_imbalance is None
        return asked and problem.scenario is None

    def even_imbalance(self, layer: int, slots: Slots) -> Floats:
        """[workloads] imbalance where each copy of an expert has an equal share of its load."""
        copies = np.bincount(slots[slots >= 0], minlength=self.problem.num_experts + 1)
        loads = (self.judged_loads[layer] / np.maximum(1, copies))[:, slots]
        rows = loads.reshape(len(loads), self.problem.num_ranks, -1)
        return self._imbalance(rows.sum(axis=2), self.problem.workload_of_scenarios)

    def imbalance_of(self, served: Floats) -> Floats:
        """[workloads] likewise, of the pairs [C, G] that ranks serve; [1, G] of all scenarios."""
        problem = self.problem
        if problem.scenario is None:  # of one workload
            return self._imbalance(served, np.zeros(1, np.int64))
        return self._imbalance(problem.judged(served), problem.workload_of_judged)

    def _imbalance(self, load: Floats, workload: NDArray[np.int64]) -> Floats:
        """[workloads] imbalance from rank loads [C, G] in any unit, and the workload of each."""
        mean = load.mean(axis=1)
        worst = (load / self.problem.fair_share).max(axis=1)
        ratio = np.maximum(np.divide(worst, mean, out=np.ones_like(mean), where=mean > 0), 1.0)
        of_workload: Floats = np.bincount(workload, ratio) / np.bincount(workload)
        return of_workload

    def moves(self, layer: int, slots: Slots) -> int:
        rank = np.arange(slots.size) // self.problem.slots_per_rank
        return int((~self.held(layer)[slots, rank]).sum())

    def candidate(self, layer: int, slots: Slots, width: int) -> Candidate:
        """What a layer costs by itself (alltoall dispatch): span, or messages with replicas."""
        if self.replicates:
            traffic, imbalance = self._served(layer, slots)
            if self.balances_evenly:
                imbalance = self.even_imbalance(layer, slots)
        else:
            traffic, imbalance = self._span(layer, slots), self.imbalance(layer, slots)
        return Candidate(slots, traffic, imbalance, self.moves(layer, slots), width)

    def _span(self, layer: int, slots: Slots) -> Floats:
        covered = cover_levels(self, self.bits[layer], slots)
        return self.priced(covered, self.row_prices)

    def priced(self, rows: Words, row_prices: Floats) -> Floats:
        """[workloads] set bits of rows [R, words] at the rows' prices, per token."""
        count = np.bitwise_count(rows).astype(np.float64)
        by_word = row_prices @ count
        total = np.diff(np.append(0.0, np.cumsum(by_word))[self.segments])
        priced: Floats = total / np.maximum(1, self.num_tokens)
        return priced

    def _served(self, layer: int, slots: Slots) -> tuple[Floats, Floats]:
        """Every token chooses its copies, as in a replay."""
        from solvers.serving import serve_layer

        problem = self.problem
        assert problem.tokens is not None
        count = len(problem.tokens)
        home = np.full(count, -1) if problem.home is None else problem.home
        batch = np.zeros(count, np.int64) if problem.batch is None else problem.batch
        scenario = np.zeros(count, np.int64) if problem.scenario is None else problem.scenario
        num_scenarios = 1 if problem.scenario is None else problem.workload_of_scenarios.size
        load = np.zeros((num_scenarios, problem.num_ranks))
        traffic = np.zeros(problem.num_workloads)
        serve_layer(
            np.ascontiguousarray(problem.tokens[:, layer]), slots, problem.num_experts,
            problem.num_nodes, home, batch, scenario, problem.token_workload, self.home_prices,
            load, traffic,
        )  # fmt: skip
        traffic /= np.bincount(problem.token_workload, minlength=traffic.size)
        return traffic, self.imbalance_of(load)


def cover(bits: Words, slots: Slots, groups: int) -> Words:
    """[groups, words] tokens with an expert in each of `groups` equal runs of slots."""
    from solvers.anneal import cover as cover_run

    covered = np.zeros((groups, bits.shape[1]), np.uint64)
    scratch = np.zeros(bits.shape[1], np.uint64)
    width = slots.size // groups
    for group in range(groups):
        cover_run(bits, slots, group * width, (group + 1) * width, covered[group], scratch)
    return covered


def cover_levels(layers: Layers, bits: Words, slots: Slots) -> Words:
    """[sum of groups, words] `cover` at every level, stacked."""
    return np.concatenate([cover(bits, slots, int(groups)) for groups in layers.groups])


def anneal(
    layers: Layers,
    layer: int,
    slots: Slots,
    width: int,
    prices: Prices,
    *,
    proposals: int,
    seed: Sequence[int],
    hot: float = 1.0,
    cold: float | None = None,
    neighbours: tuple[Slots | None, Slots | None] = (None, None),
) -> Slots:
    """A copy of `slots`, annealed from hot to cold times the layer's own heat.

    Args:
        width: slots per rank that may be filled.
        cold: by default by how often each pair of slots is proposed: few proposals had better end
            in a descent, many pay longer where it is lukewarm.
        neighbours: slots of the layers before and after, where they matter (coherent dispatch).
    """
    from solvers.anneal import anneal_layer
    from solvers.anneal_replicas import anneal_layer_replicas

    bits = layers.bits[layer]
    result = slots.copy()
    heat = layers.heat_at(prices)
    often = proposals / (slots.size**2 / 2) >= OFTEN
    start = heat + (layers.node_heat if often else 0.0)
    if cold is None:
        cold = LUKEWARM if often else COLD
    end = heat / start if start > 0 else 1.0
    common = (
        bits, layers.segments, layers.token_prices(prices), layers.groups, layers.row_prices,
        layers.loads[layer], layers.load_prices(prices), layers.problem.fair_share,
        layers.held(layer), prices.move, result, layers.free(layer, slots, width),
        hot * start, (cold / hot * end) ** (1.0 / proposals), proposals,
        int(np.random.SeedSequence(list(seed)).generate_state(1)[0]),
    )  # fmt: skip
    if layers.replicates:
        anneal_layer_replicas(*common, layers.draws(layer), layers.steering, layers.stop)
        return result
    primary_bits = home = next_once = None
    if layers.coupled:
        primary_bits = layers.primary_bits[layer]
        home = next_once = np.zeros((layers.groups.sum(), bits.shape[1]), np.uint64)
        before, after = neighbours
        if before is not None:
            home = cover_levels(layers, layers.primary_bits[layer - 1], before)
        if after is not None:
            next_once = cover_levels(layers, layers.bits[layer + 1], after)
    anneal_layer(*common, primary_bits, home, next_once, layers.stop)
    return result


def prepare(problem: Problem) -> Layers:
    """Pack the problem's tokens, workload by workload."""
    from solvers.anneal import pack_bits

    num_experts, num_layers = problem.num_experts, problem.num_layers
    spare = problem.num_slots > num_experts
    if problem.tokens is None or (problem.dispatch == "allgather" and not spare):
        none = [np.zeros((num_experts + 1, 0), np.uint64)] * num_layers
        zero = np.zeros(problem.num_workloads + 1, np.int64)
        return Layers(problem, none, none, zero, zero[1:], zero[:0])
    replicates = spare and problem.dispatch != "coherent"
    stride = -(-len(problem.tokens) // (REPLICA_TOKENS if replicates else MOST_TOKENS))
    workload = problem.token_workload[::stride]
    kept = np.argsort(workload, kind="stable")
    num_tokens = np.bincount(workload, minlength=problem.num_workloads)
    words = -(-num_tokens // 64)
    segments = np.append(0, np.cumsum(words))
    # row of each kept token: those of a workload begin with a new word
    first = segments[:-1] - np.append(0, np.cumsum(num_tokens))[:-1] / 64
    row = np.arange(kept.size) + np.round(first[workload[kept]] * 64).astype(np.int64)
    sample = np.full(int(segments[-1]) * 64, -1, np.int64)
    sample[row] = kept * stride

    def packed(columns: NDArray[np.integer]) -> Words:
        padded = np.where(sample[:, None] >= 0, columns[sample], -1).astype(np.int64)
        bits: Words = pack_bits(padded, num_experts)
        return bits

    bits = [packed(problem.tokens[:, layer]) for layer in range(num_layers)]
    primary_bits = bits
    if problem.dispatch == "coherent":
        primary = problem.tokens[:, :, 0] if problem.primary is None else problem.primary
        primary_bits = [packed(primary[:, layer : layer + 1]) for layer in range(num_layers)]
    return Layers(problem, bits, primary_bits, segments, num_tokens, sample)

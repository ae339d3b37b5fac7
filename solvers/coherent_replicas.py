"""Replicas under coherent dispatch: redundant slots are filled where tokens are.

Where a token is when it enters a layer decides which copies serve it, and where its primary expert
is served decides where it is next. Placements of `solvers.coherent`, which have one copy of each
expert, are annealed on with redundant slots: tokens walk through all layers (`solvers.walking`),
then odd and even layers in turn are annealed against where tokens enter them and against what the
next layer then costs (`solvers.anneal_coherent`). Each anneal goes on from the best placement so
far, cooler than the last. What the walk of all tokens makes of a placement judges it.

What the next layer costs a token that enters it on a rank: a message less where the rank holds an
expert of the token that has no other copy, or a copy of one that no such expert's rank covers; a
message more where it holds a copy only of experts that others' ranks cover, since a copy at home
serves first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.coherent import Search, Steering, Visited, best_of, favourite, rounds
from solvers.layers import Floats, Layers, Prices, Slots, Words
from solvers.lending import borrowed
from solvers.pacing import Pace

ROUNDS = 7
SWEEPS = 12
FIRST_HEAT, COLD = 3.0, 1 / 300
HEATS = (1.0, 0.7, 0.5, 0.35, 0.25)  # of the anneals that go on from another, the last repeated
LENDERS = ("eplb_global", "tensorrt_llm_cooccurrence")
LAST_SWEEPS = 4  # of an anneal, whose ends are judged
HURRY = 4  # times fewer proposals than usual leave no time to cool from the first heat
MOST_PAIRS = 10_000_000  # of tokens and experts that walk with every sweep


@dataclass(frozen=True, eq=False)
class Walk:
    """Tokens on their way through the layers.

    Attributes:
        tokens: [T, L, K] expert ids, -1 = unused.
        primary: [T, L] column of the primary expert, -1 = none.
        start: [T] home rank on entering the first layer, -1 = unknown.
        batch, scenario, workload: [T] of each token.
    """

    layers: Layers
    tokens: NDArray[np.int64]
    primary: NDArray[np.int64]
    start: NDArray[np.int64]
    batch: NDArray[np.int64]
    scenario: NDArray[np.int64]
    workload: NDArray[np.int64]

    @classmethod
    def of(cls, layers: Layers, index: NDArray[np.int64]) -> Walk:
        """Of the problem's tokens at `index`; -1 stands for a token without experts."""
        problem = layers.problem
        assert problem.tokens is not None
        there = index >= 0

        def chosen(array: NDArray[np.integer] | None, missing: int) -> NDArray[np.int64]:
            if array is None:
                return np.full(index.size, missing, np.int64)
            shape = there.reshape(-1, *[1] * (array.ndim - 1))
            return np.ascontiguousarray(np.where(shape, array[index], missing), np.int64)

        tokens = chosen(problem.tokens, -1)
        primary = np.where(tokens[:, :, 0] >= 0, 0, -1)
        if problem.primary is not None:
            same = (tokens == chosen(problem.primary, -1)[:, :, None]) & (tokens >= 0)
            primary = np.where(np.logical_or.reduce(same, axis=2), same.argmax(axis=2), -1)
        return cls(
            layers, tokens, primary, chosen(problem.home, -1), chosen(problem.batch, 0),
            chosen(problem.scenario, 0), np.maximum(chosen(problem.token_workload, 0), 0),
        )  # fmt: skip

    def along(self, placement: Sequence[Slots]) -> tuple[Floats, Floats, NDArray[np.int16]]:
        """Walk: messages [workloads] at their prices, pairs [C, L, G], homes [L, T]."""
        from solvers.walking import copies_of, walk_tokens

        problem = self.layers.problem
        found = [copies_of(s, problem.num_experts, problem.num_ranks) for s in placement]
        count = np.stack([c for c, _ in found])
        most = max(r.shape[1] for _, r in found)
        ranks = np.stack(
            [np.pad(r, ((0, 0), (0, most - r.shape[1])), constant_values=-1) for _, r in found]
        )
        num_scenarios = 1 if problem.scenario is None else problem.workload_of_scenarios.size
        load = np.zeros((num_scenarios, problem.num_layers, problem.num_ranks))
        traffic = np.zeros(problem.num_workloads)
        homes = np.zeros((problem.num_layers, len(self.tokens)), np.int16)
        walk_tokens(
            self.tokens, self.primary, count, ranks, self.start, self.batch, self.scenario,
            self.workload, self.layers.row_prices, problem.ranks_per_node, load, traffic, homes,
        )  # fmt: skip
        return traffic, load, homes


@dataclass(eq=False)
class Filling:
    """Anneals with replicas that go on from what a search without them found."""

    search: Search
    budget: Budget
    visited: list[Visited] = field(default_factory=list)

    @property
    def layers(self) -> Layers:
        return self.search.layers

    def fill(self) -> list[Slots]:
        """The best placement under the caps of the search that a few anneals find."""
        caps = self.search.caps
        self.begin()
        steering = Steering.of(self.layers, caps)
        for number in rounds(self.budget, ROUNDS):
            steering.tell(self.improved(steering.prices(), number, first=number == 0))
        return best_of(self.visited, caps).placement

    def begin(self) -> None:
        """Judge what there is: placements without replicas, the one in use, and borrowed ones."""
        placements = [found.placement for found in self.search.visited]
        if self.layers.problem.current is not None:
            placements.append(self.in_use())
        if not self.budget.expired():
            lent = borrowed(self.layers.problem, LENDERS, self.search.seed, self.budget)
            placements += [list(placement) for placement in lent]
        self.visited = [self.judged(placement) for placement in placements]

    def improved(self, prices: Prices, number: int, *, first: bool) -> Visited:
        """One anneal, from what is best at the prices.

        The first is so hot that it forgets the replicas that it starts from, and so it starts from
        a placement without; where time is too short to cool from there it is as cool as the last.
        """
        hurried = HURRY * self.layers.proposals < self.layers.usual_proposals
        start, heat = favourite(self.visited, prices), HEATS[min(number, len(HEATS)) - 1]
        if hurried:
            heat = HEATS[-1]
        elif first:
            start, heat = favourite(self.visited[: len(self.search.visited)], prices), FIRST_HEAT
        last = self.run(prices, number, start.placement, heat)
        found = [self.judged(last[-1])]
        for placement in reversed(last[:-1]):
            if self.budget.expired():
                break
            found.append(self.judged(placement))
        self.visited += found
        return favourite(found, prices)

    def in_use(self) -> list[Slots]:
        """The current placement, replicas and all, where a layer allows it."""
        layers = range(self.layers.problem.num_layers)
        return [self.layers.start(i, self.search.width(i), replicas=True) for i in layers]

    @cached_property
    def everyone(self) -> Walk:
        tokens = self.layers.problem.tokens
        assert tokens is not None
        return Walk.of(self.layers, np.arange(len(tokens)))

    @cached_property
    def followed(self) -> tuple[Walk, NDArray[np.int64]]:
        """A walk that anneals begin with, and which of its tokens each bit stands for, -1 = none.

        Of all tokens, or where that takes long of those that have a bit.
        """
        tokens, sample = self.layers.problem.tokens, self.layers.sample
        if tokens is None or tokens.size <= MOST_PAIRS:
            return self.everyone, sample
        return Walk.of(self.layers, sample), np.where(sample >= 0, np.arange(sample.size), -1)

    def judged(self, placement: list[Slots]) -> Visited:
        """What the walk of all tokens makes of a placement."""
        layers, problem = self.layers, self.layers.problem
        traffic, load, _ = self.everyone.along(placement)
        count = np.bincount(self.everyone.workload, minlength=traffic.size)
        traffic = traffic / np.maximum(1, count * problem.num_layers)
        each = [layers.imbalance_of(load[:, i]) for i in range(problem.num_layers)]
        if layers.balances_evenly:
            each = [layers.even_imbalance(i, slots) for i, slots in enumerate(placement)]
        imbalance = np.mean(each, axis=0)
        return Visited(
            float(problem.aggregate(traffic + self.search.caps.floor * imbalance)),
            float(problem.aggregate(imbalance)),
            traffic,
            imbalance,
            sum(layers.moves(i, s) for i, s in enumerate(placement)),
            placement,
        )

    def run(
        self, prices: Prices, number: int, placement: list[Slots], hot: float
    ) -> list[list[Slots]]:
        """What the last sweeps of an anneal from `placement` end with; as the budget allows."""
        ends = [placement]
        problem = self.layers.problem
        pace = Pace(self.budget, 2 * SWEEPS, max(1, self.layers.proposals // SWEEPS))
        ratio = (COLD / hot) ** (1 / SWEEPS)
        for sweep in range(SWEEPS):
            for parity in (0, 1):
                if self.budget.expired():
                    return [placement]
                walk, bit = self.followed
                _, served, homes = walk.along(placement)
                served = self.relative(served)
                homes = np.where(bit >= 0, homes[:, bit], -1)
                steps = pace.steps()

                def job(
                    layer: int,
                    now: list[Slots] = placement,
                    homes: NDArray[np.int16] = homes,
                    served: Floats = served,
                    hot: float = hot,
                    sweep: int = sweep,
                    steps: int = steps,
                ) -> Slots:
                    return self.anneal(
                        layer, now, homes[layer], served[:, layer], prices, steps,
                        (hot, hot * ratio), (self.search.seed, layer, number, sweep, 1),
                    )  # fmt: skip

                moved = list(self.search.executor.map(job, range(parity, problem.num_layers, 2)))
                placement = list(placement)
                placement[parity::2] = moved
            hot *= ratio
            ends.append(placement)
        return ends[-LAST_SWEEPS:]

    def anneal(
        self,
        layer: int,
        placement: list[Slots],
        homes: NDArray[np.int16],
        served: Floats,
        prices: Prices,
        proposals: int,
        heat: tuple[float, float],
        seed: Sequence[int],
    ) -> Slots:
        """A copy of one layer's slots, annealed from hot to cold times the layer's own heat."""
        from solvers.anneal import pack_bits
        from solvers.anneal_coherent import anneal_layer_coherent

        layers, problem = self.layers, self.layers.problem
        result = placement[layer].copy()
        own = layers.heat_at(prices)
        home = self.stacked(pack_bits(homes.astype(np.int64)[:, None], problem.num_ranks)[:-1])
        gain, loss = self.entering(layer + 1, placement)
        hot, cold = heat
        anneal_layer_coherent(
            layers.bits[layer], layers.primary_bits[layer], layers.segments,
            layers.token_prices(prices), problem.num_ranks, layers.row_prices,
            layers.loads[layer], layers.load_prices(prices), problem.fair_share,
            layers.held(layer), prices.move, result,
            layers.free(layer, result, self.search.width(layer)), hot * own,
            (cold / hot) ** (1 / proposals), proposals,
            int(np.random.SeedSequence(list(seed)).generate_state(1)[0]),
            layers.draws(layer), home, gain, loss,
            np.ascontiguousarray(served), layers.stop,
        )  # fmt: skip
        return result

    def relative(self, load: Floats) -> Floats:
        """[C, L, G] rank loads of the scenarios of `Layers.loads`, by those that tokens brought.

        In units of each scenario's mean and of each rank's fair share.
        """
        count, problem = self.layers.loads.shape[1], self.layers.problem
        if problem.scenario is not None:
            load = self.layers.annealed(load)
        load = np.repeat(load, count // len(load), axis=0)
        mean = np.maximum(load.mean(axis=2, keepdims=True), 1e-300)
        relative: Floats = load / mean / problem.fair_share
        return relative

    def stacked(self, rows: Words) -> Words:
        """[R, words] rows of ranks, and those of nodes below them where nodes count."""
        if self.layers.groups.size == 1:
            return np.ascontiguousarray(rows)
        nodes = rows.reshape(self.layers.problem.num_nodes, -1, rows.shape[1])
        return np.concatenate([rows, np.bitwise_or.reduce(nodes, axis=1)])

    def entering(self, layer: int, placement: list[Slots]) -> tuple[Words, Words]:
        """[R, words] tokens that save, and that pay, a message in a layer entered there."""
        layers, problem = self.layers, self.layers.problem
        words = layers.bits[0].shape[1]
        if layer == problem.num_layers:
            nothing = np.zeros((layers.row_prices.size, words), np.uint64)
            return nothing, nothing
        bits, slots = layers.bits[layer], placement[layer]
        rank = np.arange(slots.size) // problem.slots_per_rank
        copies = np.bincount(slots[slots >= 0], minlength=problem.num_experts)
        gain = np.zeros((problem.num_ranks, words), np.uint64)
        for slot in np.flatnonzero((slots >= 0) & (copies[slots] == 1)):
            gain[rank[slot]] |= bits[slots[slot]]
        certain = self.stacked(gain)
        gain = certain.copy()
        loss = np.zeros_like(gain)
        for expert in np.flatnonzero(copies > 1):
            ranks = rank[slots == expert]
            covered = bits[expert] & np.bitwise_or.reduce(certain[ranks], axis=0)
            gain[ranks] |= bits[expert] & ~covered
            loss[ranks] |= covered
            if gain.shape[0] > problem.num_ranks:
                nodes = problem.num_ranks + np.unique(ranks // problem.ranks_per_node)
                covered = np.bitwise_or.reduce(certain[nodes], axis=0)
                gain[nodes] |= bits[expert] & ~covered
        return gain, loss & ~gain

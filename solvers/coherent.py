"""Local search for coherent dispatch: neighbouring layers matter to each other.

Odd and even layers are annealed in turn against their neighbours while the temperature falls;
between sweeps the rank labels of each layer are matched to those of its neighbours by an assignment
problem, which swaps cannot do. The price of imbalance is pursued, that of moves found by bisection,
those of workloads by multiplicative weights (Arora, Hazan and Kale, Theory of Computing 8, 2012).
Anneals start in turn from the experts' own order, from a placement that keeps most primary flow on
its rank, or on its node first (`solvers.chain`), and from what is best so far.
Redundant slots are filled after that, see `solvers.coherent_replicas`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.layers import Floats, Layers, Prices, Slots, Words, anneal, cover, cover_levels
from solvers.pacing import Pace
from solvers.parallel import available_cores
from solvers.problem import Problem
from solvers.selection import Caps

ROUNDS = 12
SWEEPS = 24
FIRST_HEAT, COLD = 2.0, 1 / 300
FIRST_PRICE = 2.0  # of imbalance, times what a message between nodes costs in all
AIM, LEAST_EXCESS = 0.97, 1e-3  # of what the cap allows above 1
STEP = 3.0  # by which a price changes at most
ROOTS = 2.0, 6.0
FIRST_MOVE_PRICE = 0.3  # in shares of the tokens of a mean expert
CHAIN_SHARE = 0.2  # of a time limit
ROUGHLY = 0.25  # of the usual effort on chains, where primary experts are not all of the traffic
REWEIGHT = 8.0  # how strongly workloads that fare worse gain weight
PLAIN_SHARE = 0.35  # of a time limit, where redundant slots are to be filled after it


@dataclass(frozen=True, eq=False)
class Visited:
    """A placement that an anneal ended with.

    Attributes:
        cost: what the objective makes of it, workloads by `robust`.
        imbalance: likewise.
        traffic: [workloads] messages per token and layer.
        loads: [workloads] max / mean rank load, averaged over layers and scenarios.
        moves: over all layers.
        placement: [L] slots.
    """

    cost: float
    imbalance: float
    traffic: Floats
    loads: Floats
    moves: int
    placement: list[Slots]


@dataclass(eq=False)
class Bisection:
    """The least price at which something keeps its cap."""

    price: float
    low: float = 0.0
    high: float = float("inf")

    def tell(self, kept: bool) -> None:
        """The last price did or did not; move on to the next to try."""
        if kept:
            self.high = min(self.high, self.price)
        else:
            self.low = max(self.low, self.price)
        if self.high == float("inf"):
            self.price = self.low * 3
        elif self.low > 0:
            self.price = (self.low * self.high) ** 0.5
        else:
            self.price = self.high / 3


@dataclass(eq=False)
class Pursuit:
    """The price of imbalance at which its cap is kept, as anneals that differ by chance tell it.

    What imbalance exceeds 1 by falls roughly with the root of its price, and with a higher one
    where chance is most of what is left: the last two anneals tell, within ROOTS.
    """

    price: float
    floor: float
    cap: float | None
    last: tuple[float, float] | None = None  # price, and what imbalance exceeded 1 by

    def tell(self, imbalance: float) -> None:
        """What an anneal at the last price reached; move on to the next to try."""
        if self.cap is None:
            return
        excess = max(imbalance - 1, LEAST_EXCESS)
        factor = (excess / max(AIM * (self.cap - 1), LEAST_EXCESS)) ** self._root(excess)
        self.last = self.price, excess
        self.price = max(self.floor, self.price * min(STEP, max(1 / STEP, factor)))

    def _root(self, excess: float) -> float:
        if self.last is None or self.price <= self.last[0]:
            return ROOTS[0]
        fallen = np.log(self.last[1] / excess)
        return float(np.clip(np.log(self.price / self.last[0]) / max(fallen, 1e-9), *ROOTS))


@dataclass(eq=False)
class Steering:
    """The prices of the next anneal, by what the ones before it ended with.

    Attributes:
        caps: what is to be kept; without a cap on imbalance its price stays at the floor.
        load, move: the least price at which each is kept.
        weight: [workloads] of their messages, sum 1; even where `robust` asks for the mean.
    """

    problem: Problem
    caps: Caps
    load: Pursuit
    move: Bisection
    weight: Floats

    @classmethod
    def of(cls, layers: Layers, caps: Caps) -> Steering:
        """Steering that has been told nothing yet."""
        count = layers.problem.num_workloads
        first = FIRST_PRICE * (1 + layers.problem.node_weight * (layers.groups.size > 1))
        return cls(
            layers.problem,
            caps,
            Pursuit(max(first, 3 * caps.floor), caps.floor, caps.imbalance),
            Bisection(FIRST_MOVE_PRICE * layers.token_share),
            np.full(count, 1 / count),
        )

    def prices(self, load: float | None = None) -> Prices:
        """With the price `load` of imbalance, or that at which its cap may be kept."""
        price = self.caps.floor if self.caps.imbalance is None else self.load.price
        price = price if load is None else load
        move = 0.0 if self.caps.moves is None else self.move.price
        return Prices(tuple(self.weight.tolist()), tuple((price * self.weight).tolist()), move)

    def tell(self, found: Visited) -> None:
        """What an anneal under `prices` ended with."""
        self.load.tell(found.imbalance)
        if self.caps.moves is not None:
            self.move.tell(found.moves <= self.caps.moves)
        if self.problem.robust != "mean":
            worse = found.traffic / max(found.traffic.mean(), 1e-300) - 1
            weight = self.weight * np.exp(REWEIGHT * worse)
            self.weight = weight / weight.sum()


@dataclass(eq=False)
class Search:
    """Anneals of all layers, and what they ended with."""

    layers: Layers
    seed: int
    budget: Budget
    caps: Caps
    executor: Executor
    visited: list[Visited] = field(default_factory=list)

    @property
    def problem(self) -> Problem:
        return self.layers.problem

    def width(self, layer: int) -> int:
        """Slots per rank of a layer."""
        return self._widths[layer]

    @cached_property
    def _widths(self) -> list[int]:
        """[L] slots per rank: as evenly as each layer's least allows when there is a budget."""
        problem = self.problem
        most = problem.slots_per_rank
        if problem.slot_budget is None:
            return [most] * problem.num_layers
        widths = [self.layers.fewest(layer) for layer in range(problem.num_layers)]
        for _ in range(problem.slot_budget - sum(widths)):
            narrowest = int(np.argmin(widths))
            if widths[narrowest] == most:
                break
            widths[narrowest] += 1
        return widths

    def starts(self) -> list[Slots]:
        layers = range(self.problem.num_layers)
        return [self.layers.start(layer, self.width(layer)) for layer in layers]

    def warm_starts(self) -> list[list[Slots]]:
        """Placements that keep the flow of primary experts: on ranks, and on nodes if they count.

        None where something else is asked of where experts sit.
        """
        found = [chained(self)]
        even = self.problem.num_experts % self.problem.num_nodes == 0
        if self.layers.groups.size > 1 and even:
            found.insert(0, chained(self, nodes_first=True))
        return [start for start in found if start is not None]

    def run(
        self, prices: Prices, number: int, placement: list[Slots], hot: float = FIRST_HEAT
    ) -> Visited:
        """One anneal from `placement`, as far as the budget allows."""
        problem, layers = self.problem, self.layers
        pace = Pace(self.budget, 2 * SWEEPS, max(1, layers.proposals // SWEEPS))
        ratio = (COLD * FIRST_HEAT / hot) ** (1 / SWEEPS)
        for sweep in range(SWEEPS):
            if self.budget.expired():
                break
            for parity in (0, 1):
                steps = pace.steps()

                def job(
                    layer: int, now: list[Slots] = placement, hot: float = hot, sweep: int = sweep,
                    steps: int = steps,
                ) -> Slots:  # fmt: skip
                    return anneal(
                        layers, layer, now[layer], self.width(layer), prices, proposals=steps,
                        seed=(self.seed, layer, number, sweep), hot=hot, cold=hot * ratio,
                        neighbours=(
                            now[layer - 1] if layer > 0 else None,
                            now[layer + 1] if layer + 1 < problem.num_layers else None,
                        ),
                    )  # fmt: skip

                moved = list(self.executor.map(job, range(parity, problem.num_layers, 2)))
                placement = list(placement)
                placement[parity::2] = moved
            hot *= ratio
            if sweep % 3 == 2:
                placement = self.aligned(placement)
        found = self.judged(self.aligned(placement))
        self.visited.append(found)
        return found

    def aligned(self, placement: list[Slots]) -> list[Slots]:
        """With matched rank labels, where ranks are alike and that saves messages."""
        problem = self.problem
        alike = problem.pinned is None and problem.current is None and problem.rank_slots is None
        if not alike or problem.rank_speed is not None or problem.link_cost is not None:
            return placement
        matched = match_labels(self.layers, placement)
        before, after = (coherent_traffic(self.layers, which) for which in (placement, matched))
        return matched if after.sum() <= before.sum() else placement

    def judged(self, placement: list[Slots]) -> Visited:
        problem, layers = self.problem, self.layers
        traffic = coherent_traffic(layers, placement)
        judged = [layers.imbalance(i, slots) for i, slots in enumerate(placement)]
        imbalance = np.mean(judged, axis=0)
        return Visited(
            float(problem.aggregate(traffic + self.caps.floor * imbalance)),
            float(problem.aggregate(imbalance)),
            traffic,
            imbalance,
            sum(layers.moves(i, s) for i, s in enumerate(placement)),
            placement,
        )

    def best(self) -> list[Slots]:
        return best_of(self.visited, self.caps).placement


def keeps(found: Visited, caps: Caps) -> bool:
    """Whether a placement keeps the caps."""
    balanced = caps.imbalance is None or found.imbalance <= caps.imbalance
    return balanced and (caps.moves is None or found.moves <= caps.moves)


def best_of(visited: Sequence[Visited], caps: Caps) -> Visited:
    """The least cost under the caps; if none keeps them, the least imbalance within the moves."""
    kept = [found for found in visited if keeps(found, caps)]
    if kept:
        return min(kept, key=lambda found: found.cost)
    few = [found for found in visited if caps.moves is None or found.moves <= caps.moves]
    return min(few or visited, key=lambda found: found.imbalance)


def search_coherent(layers: Layers, seed: int, budget: Budget, caps: Caps) -> list[Slots]:
    """The best placement under the caps that a few anneals find, see the module's docstring."""
    from solvers.coherent_replicas import Filling

    problem = layers.problem
    spare = problem.num_slots > problem.num_experts
    plain_budget = budget.part(PLAIN_SHARE) if spare else budget
    with ThreadPoolExecutor(available_cores()) as executor:
        search = Search(layers, seed, plain_budget, caps, executor)
        starts = search.starts()
        if problem.current is not None:
            search.visited.append(search.judged(starts))
        steering = Steering.of(layers, caps)
        warm = search.warm_starts()
        for number in rounds(plain_budget, ROUNDS):
            prices = steering.prices()
            start, heat = starts, FIRST_HEAT
            if number % 3 == 1 and warm:
                start, heat = warm[number // 3 % len(warm)], FIRST_HEAT / 4
            elif number % 3 == 2:
                start, heat = favourite(search.visited, prices).placement, FIRST_HEAT / 4
            steering.tell(search.run(prices, number, start, heat))
        if not spare:
            return search.best()
        return Filling(search, budget).fill()


def favourite(visited: Sequence[Visited], prices: Prices) -> Visited:
    """The placement that is worth most at some prices."""
    weight, load = np.array(prices.traffic), np.array(prices.imbalance)
    return min(visited, key=lambda v: v.traffic @ weight + v.loads @ load + prices.move * v.moves)


def rounds(budget: Budget, usual: int) -> Iterator[int]:
    """0, 1, .. as long as the budget has time; without a limit the usual number of rounds."""
    yield 0
    for number in range(1, 4 * usual if budget.seconds is not None else usual):
        if budget.expired():
            return
        yield number


def match_labels(layers: Layers, placement: list[Slots]) -> list[Slots]:
    """Relabel the ranks of each layer so that most tokens find an expert where they are.

    With the neighbours fixed, the best labels of a layer are a linear assignment problem over ranks
    (over nodes first, then over the ranks of each node, when there are several nodes). Tokens of
    every workload count alike.
    """
    from scipy.optimize import linear_sum_assignment

    problem = layers.problem
    ranks, width = problem.num_ranks, problem.slots_per_rank
    placement = [slots.copy() for slots in placement]

    def gains(layer: int, groups: int) -> NDArray[np.int64]:
        """[groups here, label] tokens that would not move."""
        total = np.zeros((groups, groups), np.int64)
        here = cover(layers.bits[layer], placement[layer], groups)
        if layer > 0:
            home = cover(layers.primary_bits[layer - 1], placement[layer - 1], groups)
            total += _common(here, home)
        if layer + 1 < problem.num_layers:
            leave = cover(layers.primary_bits[layer], placement[layer], groups)
            after = cover(layers.bits[layer + 1], placement[layer + 1], groups)
            total += _common(leave, after)
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


def _common(first: Words, second: Words) -> NDArray[np.int64]:
    """[R, Q] set bits that rows [R, words] and [Q, words] share; O(R Q words)."""
    shared = np.empty((len(first), len(second)), np.int64)
    for index, row in enumerate(first):
        shared[index] = np.bitwise_count(row & second).sum(axis=1, dtype=np.int64)
    return shared


def coherent_traffic(layers: Layers, placement: Sequence[Slots]) -> Floats:
    """[workloads] mean over layers of 2 x span less 1 for each token that finds an expert at home.

    At the rows' prices.
    """
    prices = layers.row_prices
    total = np.zeros(layers.num_tokens.size)
    home: Words | None = None
    for layer, slots in enumerate(placement):
        here = cover_levels(layers, layers.bits[layer], slots)
        total += 2 * layers.priced(here, prices)
        if home is not None:
            total -= layers.priced(here & home, prices)
        home = cover_levels(layers, layers.primary_bits[layer], slots)
    return total / len(placement)


def chained(search: Search, *, nodes_first: bool = False) -> list[Slots] | None:
    """The placement that keeps most primary flow on its rank, where nothing else is asked.

    Where tokens use one expert a layer, that is all that traffic depends on. With `nodes_first`
    most of it is kept on its node, and then on its rank within each node.
    """
    problem = search.problem
    plain = problem.pinned is None and problem.rank_slots is None and problem.current is None
    flow = problem.primary_affinity
    if not plain or flow is None or problem.num_layers < 2:
        return None
    assert problem.tokens is not None
    effort = 1.0 if problem.tokens.shape[2] == 1 else ROUGHLY
    kept = partial(
        _kept, rng=np.random.default_rng(search.seed), budget=search.budget.part(CHAIN_SHARE),
        share=effort,
    )  # fmt: skip
    if not nodes_first:
        ranks = kept(flow, problem.num_ranks)
    else:
        node = kept(flow, problem.num_nodes)
        ranks = np.empty_like(node)
        for number in range(problem.num_nodes):
            here = [np.flatnonzero(row == number) for row in node]
            inside = np.stack(
                [f[np.ix_(a, b)] for f, a, b in zip(flow, here[:-1], here[1:], strict=True)]
            )
            within = kept(inside, problem.ranks_per_node)
            for row, experts, rank in zip(ranks, here, within, strict=True):
                row[experts] = number * problem.ranks_per_node + rank
    placement = []
    for row in ranks:
        slots = np.full((problem.num_ranks, problem.slots_per_rank), -1, np.int64)
        for rank in range(problem.num_ranks):
            held = np.nonzero(row == rank)[0]
            slots[rank, : held.size] = held
        placement.append(slots.reshape(-1))
    return placement


def _kept(
    flow: NDArray[np.float64],
    groups: int,
    *,
    rng: np.random.Generator,
    budget: Budget,
    share: float,
) -> NDArray[np.int64]:
    """[L, E] group of each expert, all groups about as large, that keeps most flow.

    With a share of the usual effort.
    """
    from solvers.chain import effort_for, keep_flow

    num_experts = flow.shape[1]
    sizes = np.array([part.size for part in np.array_split(np.arange(num_experts), groups)])
    effort = effort_for(len(flow) + 1, num_experts, groups)
    effort = replace(
        effort,
        num_starts=max(2, round(share * effort.num_starts)),
        num_rounds=max(2, round(share * effort.num_rounds)),
    )
    return keep_flow(flow, sizes, rng, budget, effort)

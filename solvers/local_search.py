"""Joint local search over traffic, load and replicas, with a cap on imbalance.

Problem: place experts so that tokens meet few ranks (span), or, with coherent dispatch, so that
they also find an expert where the previous layer left them, while the busiest rank of a layer stays
close to the mean; in each scenario of the load, for each workload.

Method: a layer is annealed by swaps of two slots on exact token bitsets (`solvers.anneal`; with
replicas `solvers.anneal_replicas`) under prices of max / mean rank load, of each workload's
messages, and of moves.

- alltoall: layers do not influence each other but through the caps. Each is annealed under a ladder
  of prices, which yields a frontier per layer. A master program over these candidates says at which
  prices they trade (`solvers.selection`); the layers are annealed again, longer, around these
  prices, which is a column generation; at last an integer program picks one candidate per layer.
  Where there is no time for that: see `solvers.hurrying`.
- coherent: see `solvers.coherent`.

Complexity: O(L x proposals x T / 64) time, O(L x E x T / 64) words. No guarantee; deterministic
for a seed when no time limit cuts it short. With a time limit, rounds go on until they stop paying.
Source: placer.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from solvers import hurrying
from solvers.budget import Budget
from solvers.layers import Candidate, Layers, Prices, Slots, anneal, prepare
from solvers.lending import borrowed
from solvers.pacing import paced
from solvers.parallel import available_cores, stopping
from solvers.preferring import or_current
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution
from solvers.selection import ELASTIC_PRICE, Caps, choose, prices

# Prices of max / mean rank load, in messages per token and layer.
LADDER = (0.0, 0.1, 0.2, 0.4, 0.7, 1.2, 2.0, 4.0, 10.0, 40.0)
# Prices of a move, in shares of the tokens of a mean expert.
MOVE_LADDER = (0.03, 0.1, 0.3, 1.0, 3.0)
BALANCE_PRICE = ELASTIC_PRICE
LADDER_SHARE = 4  # times fewer proposals than a long anneal has
ROUNDS = 3
LENDERS = ("eplb_global", "tensorrt_llm_cooccurrence", "flashlb", "swift")
AROUND = (1 / 1.6, 1.0, 1.6)
# Proposals per expert below which anneals are short, and the step through the ladder then.
SHORT, SPARSE = 60, 3
PATIENCE = 2  # rounds without improvement after which even a longer time limit ends the search
IMPROVEMENT = 2e-4
WARM = 0.25  # of the first temperature, when an anneal goes on from a good placement


@dataclass(eq=False)
class Search:
    """The candidates of every layer, found so far.

    Attributes:
        lenders: solvers whose placements are candidates from the beginning; by default LENDERS
            where there are replicas to place.
    """

    layers: Layers
    seed: int
    budget: Budget
    pools: list[list[Candidate]] = field(default_factory=list)
    rounds: int = 0
    around: Sequence[float] = AROUND
    lenders: Sequence[str] = ()

    @property
    def problem(self) -> Problem:
        return self.layers.problem

    def widths(self, layer: int) -> range:
        """Slots per rank that a layer may get."""
        most = self.problem.slots_per_rank
        if self.problem.slot_budget is None:
            return range(most, most + 1)
        return range(self.layers.fewest(layer), most + 1)

    def begin(self, floor: float, capped: bool, caps: int = 1) -> None:
        """The starting placement of each layer, and a ladder of prices.

        Where the time allows only short anneals, there are fewer of them, at fewer prices.

        Args:
            floor, capped: of imbalance: its least price, and whether a higher one may be wanted.
            caps: how many will be searched for in each of the rounds that follow.
        """
        problem = self.problem
        uncapped = not capped and problem.num_workloads == 1
        ladder = [floor] if uncapped else [floor, *(mu for mu in LADDER if mu > floor)]
        moves = [0.0]
        if problem.max_moves is not None:
            moves = [share * self.layers.token_share for share in MOVE_LADDER]
        around = AROUND if capped and caps == 1 else (1.0,)
        for self.around, costs in ((around, ladder), ((1.0,), ladder[::SPARSE])):
            wanted = [self.layers.uniform_prices(mu, move) for mu in costs for move in moves]
            later = ROUNDS * caps * len(self.around)
            widths = len(self.widths(0))
            layers = paced(
                self.layers, self.seed, self.budget,
                widths * (len(wanted) / LADDER_SHARE + later), widths * (len(wanted) + later),
            )  # fmt: skip
            if layers.proposals >= SHORT * problem.num_experts:
                break
        self.layers = layers
        self.open(self.lenders or (LENDERS if layers.replicates else ()))
        self.extend(wanted, self.layers.proposals // LADDER_SHARE)

    def open(self, lenders: Sequence[str]) -> None:
        """The starting placement of each layer, and those of some solvers."""
        self.pools = [
            [self.layers.candidate(i, self.layers.start(i, w), w) for w in self.widths(i)]
            for i in range(self.problem.num_layers)
        ]
        width = self.problem.slots_per_rank
        for placement in borrowed(self.problem, lenders, self.seed, self.budget):
            for layer, slots in enumerate(placement):
                self.pools[layer].append(self.layers.candidate(layer, slots, width))

    def favourite(self, layer: int, width: int, price: Prices) -> Slots:
        """The slots of the candidate that is worth most at a price."""
        pool = [candidate for candidate in self.pools[layer] if candidate.width == width]
        traffic, imbalance = np.array(price.traffic), np.array(price.imbalance)
        best = min(
            pool, key=lambda c: c.traffic @ traffic + c.imbalance @ imbalance + price.move * c.moves
        )
        return best.slots

    def extend(
        self,
        wanted: Sequence[Prices],
        proposals: int,
        *,
        warm: bool = False,
        some: Sequence[int] | None = None,
    ) -> None:
        """Anneal layers under each of the prices, from the start or from what is there.

        Args:
            some: the layers; all of them if None.
        """
        self.rounds += 1
        jobs = [
            (layer, width, number, price)
            for number, price in enumerate(wanted)
            for layer in (range(self.problem.num_layers) if some is None else some)
            for width in self.widths(layer)
        ]

        def run(job: tuple[int, int, int, Prices]) -> tuple[int, Candidate] | None:
            layer, width, number, price = job
            if self.budget.expired():
                return None
            start, hot = self.layers.start(layer, width), 1.0
            if warm:
                start, hot = self.favourite(layer, width, price), WARM
            slots = anneal(
                self.layers, layer, start, width, price, proposals=proposals, hot=hot,
                seed=(self.seed, layer, width, self.rounds, number),
            )  # fmt: skip
            return layer, self.layers.candidate(layer, slots, width)

        with ThreadPoolExecutor(available_cores()) as executor:
            # the pools stay as they are until all anneals that begin from them have ended
            results = list(executor.map(run, jobs))
        for found in results:
            if found is not None:
                self.pools[found[0]].append(found[1])

    def improve(self, caps: Sequence[Caps], *, warm: bool) -> None:
        """Anneal around the prices at which the candidates trade under each of the caps."""
        wanted: dict[Prices, None] = {}
        for cap in caps:
            settled = prices(self.pools, self.problem, cap)
            dear = sum(settled.imbalance) > cap.floor
            wanted |= dict.fromkeys(settled.scaled(f) for f in (self.around if dear else (1.0,)))
        self.extend(list(wanted), self.layers.proposals, warm=warm)

    def placement(self, caps: Caps) -> list[Slots]:
        """The best choice so far."""
        return [candidate.slots for candidate in choose(self.pools, self.problem, caps)]

    def imbalance(self, caps: Caps) -> float:
        """Mean imbalance of the best choice so far."""
        chosen = choose(self.pools, self.problem, caps)
        return float(self.problem.aggregate(np.mean([c.imbalance for c in chosen], axis=0)))


def search_layers(layers: Layers, seed: int, budget: Budget, caps: Caps) -> list[Slots]:
    """The layers' best placements under the caps, see the module's docstring (alltoall)."""
    search = Search(layers, seed, budget)
    if hurrying.hurries(search, caps):
        hurrying.hurry(search, caps)
        return search.placement(caps)
    capped = caps != Caps(floor=caps.floor)
    search.begin(caps.floor, capped)
    for number in range(ROUNDS):
        search.improve([caps], warm=number > 0)
    best = search.placement(caps)
    idle = 0
    while budget.seconds is not None and idle < PATIENCE and not budget.expired():
        before = worth_of(search, caps)
        search.improve([caps], warm=search.rounds % 2 == 0)
        idle = 0 if worth_of(search, caps) < before - IMPROVEMENT * abs(before) else idle + 1
        best = search.placement(caps)
    return best


def worth_of(search: Search, caps: Caps) -> float:
    """Mean cost of the choice, workloads alike: falls while rounds pay."""
    chosen = choose(search.pools, search.problem, caps)
    costs = [c.traffic.mean() + caps.floor * c.imbalance.mean() for c in chosen]
    over = np.mean([c.imbalance.mean() for c in chosen]) - (caps.imbalance or np.inf)
    return float(np.mean(costs) + ELASTIC_PRICE * max(0.0, over))


def caps_of(problem: Problem, layers: Layers) -> Caps:
    """What the problem's objective and limits come to for a choice."""
    floor = 0.0
    balance_only = problem.objective == "balance" or problem.dispatch == "allgather"
    if balance_only or not layers.has_tokens:
        floor = BALANCE_PRICE
    elif problem.objective == "latency":
        assert problem.tokens is not None
        used = float((problem.tokens >= 0).sum(axis=2).mean())
        floor = problem.latency_load_us * used / max(problem.latency_message_us, 1e-12)
        if layers.counts_homes and problem.num_ranks > 1:  # one of so many costs nothing
            floor /= 1 - 1 / problem.num_ranks
    return Caps(problem.max_imbalance, floor, problem.max_moves, problem.slot_budget)


@register("local_search", source="placer", replicates=True, restricted=True)
def local_search(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Anneals traffic, load and replicas together on exact token bitsets, under a cap on imbalance.

    Redundant slots are filled with replicas for the tokens that choose them. A placement in use
    that is allowed comes back where nothing better was found.
    """
    from solvers import coherent

    layers = prepare(problem)
    caps = caps_of(problem, layers)
    with stopping(layers.stop, budget):
        if layers.coupled:
            layers = paced(layers, seed, budget, coherent.ROUNDS, coherent.ROUNDS)
        search = coherent.search_coherent if layers.coupled else search_layers
        placement = np.stack(search(layers, seed, budget, caps))
    termination = budget.termination()
    return Solution(or_current(problem, placement), termination=termination)

"""The frontier between traffic and imbalance: placements of which none is better in both.

With alltoall dispatch the candidates that the local search collects for each layer serve all
points: caps are spread between the least imbalance and that of the least traffic, denser where
imbalance is low, and the candidates are improved around the prices of all caps together. With
coherent dispatch every point is an anneal at a price of its own, and where moves are limited at a
price of moves that is searched for. Cost: about four solves with one cap. Source: placer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from solvers import bounds, coherent, local_search
from solvers.budget import Budget
from solvers.coherent_replicas import Filling
from solvers.layers import Layers, Prices, Slots, prepare
from solvers.pacing import paced
from solvers.parallel import available_cores, stopping
from solvers.problem import Problem
from solvers.registry import get
from solvers.rehearsing import rehearse
from solvers.result import RequestError, Result, Solution
from solvers.selection import Caps
from solvers.solving import PROOF_SHARE, capped_imbalance, ctrl_c_stops, result_of

NUM_POINTS, NUM_ANNEALED = 36, 12  # of which prices candidates are sought at
COHERENT_PRICES = (0.0, 0.3, 0.7, 1.5, 3.0, 6.0, 12.0, 25.0, 60.0)
FIRST_SHARE = 0.5  # of the least imbalance above 1 that the first step is a fixed share of
RESTARTS = 1  # anneals for least traffic alone in each round; imbalance has no part in them
# Whose placements are candidates too, whether or not slots are spare: some to balance, some to save
# traffic. The choice between them and what was annealed is by the same figures.
LENDERS = (*local_search.LENDERS, "grace_moe", "occult")
MOVE_TRIES = 5  # prices of a move at each price of imbalance, where moves are limited
SEARCH = "local_search"


def frontier(problem: Problem, seed: int = 0, budget: Budget | None = None) -> list[Result]:
    """Checked placements, the most balanced first; each sends less than the one before it.

    The problem's own cap and objective play no part: the objective is traffic. Every result is as
    `solvers.solve` would give it.

    Args:
        problem: with `tokens`.
        seed: of the random numbers.
        budget: when to stop; what was found by then is given back.

    Raises:
        RequestError: the problem has no tokens, or its traffic does not depend on the placement.
    """
    if problem.tokens is None or problem.dispatch == "allgather":
        raise RequestError("a frontier needs tokens, and a dispatch whose traffic can be less")
    problem = replace(
        problem,
        max_imbalance=None,
        objective="traffic",
        resampled=problem.dispatch == "alltoall",
    )
    budget = budget or Budget()
    with ctrl_c_stops(budget):
        if budget.seconds is not None:
            rehearse(problem, get(SEARCH), budget)
        bound = bounds.lower_bound(problem, budget.part(PROOF_SHARE))
        layers = prepare(problem)
        with stopping(layers.stop, budget):
            find = _coherent if layers.coupled else _separable
            placements = find(layers, seed, budget)
    seconds, ended = budget.elapsed(), budget.termination()

    def checked(placement: list[Slots]) -> Result:
        solution = Solution(np.stack(placement), termination=ended)
        return result_of(problem, solution, SEARCH, seed, seconds, bound)

    with ThreadPoolExecutor(available_cores()) as executor:
        return _undominated(list(executor.map(checked, placements)))


def _separable(layers: Layers, seed: int, budget: Budget) -> list[list[Slots]]:
    problem = layers.problem
    limits = Caps(moves=problem.max_moves, slots=problem.slot_budget)
    search = local_search.Search(layers, seed, budget, lenders=LENDERS)
    search.begin(0.0, True, NUM_ANNEALED)

    def caps(count: int) -> list[Caps]:
        """Spread over what is possible, denser where imbalance is low."""
        least, most = search.imbalance(replace(limits, imbalance=1.0)), search.imbalance(limits)
        first = FIRST_SHARE * max(least - 1, 1e-3)
        above = np.geomspace(first, first + max(most - least, 1e-3), count) - first
        return [replace(limits, imbalance=least + float(value)) for value in above]

    free = layers.uniform_prices(0.0)
    for number in range(local_search.ROUNDS):
        search.improve(caps(NUM_ANNEALED), warm=number > 0)
        if limits.moves is None:
            search.extend([free] * RESTARTS, search.layers.proposals)
    return [search.placement(cap) for cap in caps(NUM_POINTS)]


def _coherent(layers: Layers, seed: int, budget: Budget) -> list[list[Slots]]:
    problem = layers.problem
    limits = Caps(moves=problem.max_moves, slots=problem.slot_budget)
    spare = problem.num_slots > problem.num_experts
    tries = 1 if limits.moves is None else MOVE_TRIES
    anneals = 3 * len(COHERENT_PRICES) * tries
    layers = paced(layers, seed, budget, anneals, anneals)
    steering = coherent.Steering.of(layers, limits)

    def steered(anneal: Callable[[Prices], coherent.Visited], price: float, own: Budget) -> None:
        """Anneal at a price of imbalance, and at several of moves where they are limited."""
        steering.move = coherent.Bisection(steering.move.price)
        for _ in range(tries):
            if not own.expired():
                steering.tell(anneal(steering.prices(price)))

    with ThreadPoolExecutor(available_cores()) as executor:
        plain_budget = budget.part(coherent.PLAIN_SHARE) if spare else budget
        search = coherent.Search(layers, seed, plain_budget, limits, executor)
        starts = search.starts()
        search.visited.append(search.judged(starts))
        warm = search.warm_starts()
        visited = search.visited
        for number, price in enumerate(COHERENT_PRICES):
            run = partial(search.run, number=number, placement=starts)
            steered(run, price, plain_budget)
            cooler = coherent.FIRST_HEAT / 4
            start = coherent.favourite(visited, steering.prices(price)).placement
            for other in (*warm[:1], start):
                run = partial(search.run, number=number, placement=other, hot=cooler)
                steered(run, price, plain_budget)
        if spare:
            filling = Filling(search, budget)
            filling.begin()
            visited = filling.visited
            for number, price in enumerate(COHERENT_PRICES):
                run = partial(filling.improved, number=number, first=number == 0)
                steered(run, price, budget)
    kept = [found for found in visited if coherent.keeps(found, limits)]
    return [found.placement for found in kept or visited[:1]]


def _undominated(results: list[Result]) -> list[Result]:
    """Sorted by imbalance; those that send no less than a more balanced one are left out."""
    kept: list[Result] = []
    for result in sorted(results, key=lambda r: (capped_imbalance(r.parts), r.objective)):
        if not kept or result.objective < kept[-1].objective - 1e-9:
            kept.append(result)
    return kept


def knee(results: list[Result]) -> int:
    """Index of the point where giving up more balance begins to save little.

    The point farthest below the line between the frontier's ends, both axes scaled to it
    (Satopaa, Albrecht, Irwin and Raghavan, Finding a kneedle in a haystack, 2011).
    """
    traffic = np.array([result.objective for result in results])
    imbalance = np.array([capped_imbalance(result.parts) for result in results])
    if len(results) < 3:
        return 0
    saved = (traffic[0] - traffic) / (traffic[0] - traffic[-1])
    paid = (imbalance - imbalance[0]) / (imbalance[-1] - imbalance[0])
    return int(np.argmax(saved - paid))

"""Least span or messages against imbalance, bounded from below: the levels of all layers together.

See `solvers.bounds.levels` for the proof. Under an effort, models whose tokens alone take longer to
count are left to the cheap bounds. Source: placer.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.columns import MAX_WORK, PAIR_S, Columns, LayerTokens, RankLoads
from solvers.bounds.levels import Levels, priced
from solvers.bounds.load import rank_load_bound
from solvers.bounds.token_sets import TokenSets
from solvers.budget import Budget
from solvers.layers import anneal, prepare
from solvers.parallel import stopping
from solvers.problem import Problem

Floats = NDArray[np.float64]

THREADS = 2
_PROPOSALS = 300  # times E, of a search for a placement to start from
_PRICES = (2.0, 8.0, 0.5, 0.0)  # of imbalance in these searches, in messages per token
# Of imbalance above the least one, in units of what the cap allows.
_CUTS = (0.0, 0.5, 1.0, 2.0, 4.0)
_LEAST_WIDTH = 0.02  # of that unit
_SEARCHES = 5  # of a layer, that an effort should suffice for
_TOKEN_S, _PROPOSAL_S = 2.5e-7, 7e-7  # nominal: of counting a token-expert pair; of a proposal
_ROUNDS, _GAIN = 40, 2e-4  # rounds with less relative gain than that end the search


@dataclass(eq=False)
class Curve:
    """Bounds on a figure at any imbalance: scale x (what the layers' columns bound - less).

    Attributes:
        problem: every slot holds an expert of its own.
        layers: those with tokens that there was time for.
        others: bound on the rest.
        spent: nominal seconds of setting up.
    """

    problem: Problem
    layers: list[Levels]
    others: float
    scale: float
    less: float
    spent: float

    @staticmethod
    def of(
        problem: Problem, figure: str, cheap: Floats, cap: float, budget: Budget
    ) -> Curve | None:
        """Nothing more than `cheap` yet; None where columns prove nothing, or at too much effort.

        Args:
            figure: span, messages_alltoall or messages_coherent.
            cheap: [L] bounds on it, of all tokens of a layer.
            cap: what imbalance is of most interest; infinite: none.
        """
        tokens, num_ranks, num_experts = problem.tokens, problem.num_ranks, problem.num_experts
        if tokens is None or problem.num_slots != num_experts or num_ranks == 1:
            return None
        num_layers, prices = problem.num_layers, _PRICES if cap < np.inf else (0.0,)
        setup = setup_s(problem, len(prices))
        allowed = np.inf if budget.effort is None else budget.effort - setup
        if allowed <= 0:
            return None
        home, scale, less = terms(problem, figure)
        cheap = cheap / scale + less
        max_work = int(min(MAX_WORK, allowed / num_layers / _SEARCHES / PAIR_S))
        plain = of_ranks(problem, home)
        stop = np.zeros(1, np.int64)
        with stopping(stop, budget), ThreadPoolExecutor(THREADS) as pool:
            starts = annealed(plain, prices, pool, stop)

            def levels_of(layer: int) -> Levels | None:
                if budget.expired():
                    return None
                sets = TokenSets.of(tokens[:, layer], num_experts, home)
                if not len(sets.weight):
                    return None
                loads = rank_loads(problem, layer) if cap < np.inf else RankLoads.none(num_experts)
                layer_tokens = LayerTokens(sets, num_ranks, home is not None, loads)
                columns = Columns(layer_tokens, starts[layer], max_work=max_work)
                lowest = float(loads.floor.sum())
                width = max(_LEAST_WIDTH, cap - lowest) if cap < np.inf else 0.0
                cuts = [lowest + width * part for part in (_CUTS if width else (0.0,))]
                return Levels(columns, float(cheap[layer]), cuts)

            layers = [level for level in pool.map(levels_of, range(num_layers)) if level]
        others = float(cheap.sum()) - sum(level.cheap for level in layers)
        return Curve(problem, layers, others, scale, float(less.sum()), setup)

    def known_total(self, cap: float) -> float:
        """What is proven so far for placements of at most this imbalance, all tokens and layers."""
        found = priced(self.layers, cap, self.problem.num_layers)[1]
        return self.scale * (self.others + found - self.less)

    def total(self, cap: float, budget: Budget) -> float:
        """The same, after more work. The effort counts from the beginning of the curve."""
        allowed = np.inf if budget.effort is None else budget.effort - self.spent
        stop = np.zeros(1, np.int64)
        best, rounds, last = -np.inf, 0, -np.inf
        with stopping(stop, budget), ThreadPoolExecutor(THREADS) as pool:
            while True:
                price, found = priced(self.layers, cap, self.problem.num_layers)
                best = max(best, found)
                if rounds % _ROUNDS == 0:
                    if best - last <= _GAIN * abs(best):
                        break
                    last = best
                jobs = [(each, job) for each in self.layers if (job := each.job(price)) is not None]
                if not jobs or sum(each.work for each in self.layers) >= allowed:
                    break
                if budget.expired():
                    break
                list(pool.map(lambda work: work[0].run(work[1], stop), jobs))
                rounds += 1
        return self.scale * (self.others + best - self.less)


def setup_s(problem: Problem, num_starts: int) -> float:
    """Nominal seconds of counting tokens and of searching placements to start from."""
    assert problem.tokens is not None
    proposals = problem.num_layers * num_starts * _PROPOSALS * problem.num_experts
    return problem.tokens.size * _TOKEN_S + proposals * _PROPOSAL_S


def terms(problem: Problem, figure: str) -> tuple[NDArray[np.int64] | None, float, Floats]:
    """What makes a figure of what layers' tokens cost: scale x (cost - less).

    Args:
        figure: span, messages_alltoall or messages_coherent.

    Returns:
        The homes [T] that cost nothing, None if there are none; the scale; [L] what to take off.
    """
    tokens = problem.tokens
    assert tokens is not None
    nothing = np.zeros(problem.num_layers)
    if figure == "messages_coherent":
        # a token with experts goes to, and comes back from, span - 1 ranks or more
        return None, 2.0, (tokens >= 0).any(axis=2).sum(axis=0).astype(np.float64)
    if figure == "messages_alltoall" and problem.home is not None:
        return problem.home, 1.0, nothing
    return None, 1.0 if figure == "span" else 1 - 1 / problem.num_ranks, nothing


def of_ranks(problem: Problem, home: NDArray[np.int64] | None) -> Problem:
    """The problem without nodes, restrictions and workloads, to find placements quickly."""
    return Problem(
        load=problem.load,
        num_ranks=problem.num_ranks,
        slots_per_rank=problem.slots_per_rank,
        ranks_per_node=problem.num_ranks,
        tokens=problem.tokens,
        home=home,
        scenario_load=problem.scenario_load,
        scenario=problem.scenario,
        folds=problem.folds,
    )


def rank_loads(problem: Problem, layer: int) -> RankLoads:
    """What a rank's load in a layer does to the imbalance that a cap is about.

    Several workloads count alike, which is at most what `robust` makes of them.
    """
    loads = problem.load[None]
    if problem.scenario_load is not None:
        loads = problem.judged(problem.scenario_load)
    number, workload = len(loads), problem.workload_of_judged
    weight = 1 / np.bincount(workload)[workload] / problem.num_workloads
    here = loads[:, layer]
    mean = here.sum(axis=1) / problem.num_ranks
    scaled = np.divide(weight, mean, out=np.zeros(number), where=mean > 0)
    busiest = np.array([rank_load_bound(problem, load[layer : layer + 1])[0] for load in loads])
    floor = np.where(mean > 0, busiest * scaled, weight)
    fastest = float(problem.fair_share.max())
    return RankLoads(here * scaled[:, None] / fastest, floor)


def annealed(
    problem: Problem,
    prices: Sequence[float],
    pool: ThreadPoolExecutor,
    stop: NDArray[np.int64],
) -> list[list[NDArray[np.int64]]]:
    """[layers][prices] quick placements [G, s] under prices of imbalance, in messages per token."""
    layers, width = replace(prepare(problem), stop=stop), problem.slots_per_rank

    def run(job: tuple[int, float]) -> NDArray[np.int64]:
        layer, price = job
        slots = anneal(
            layers, layer, layers.start(layer, width), width, layers.uniform_prices(price),
            proposals=_PROPOSALS * problem.num_experts, seed=(0, layer),
        )  # fmt: skip
        return slots.reshape(problem.num_ranks, width)

    jobs = [(layer, price) for layer in range(problem.num_layers) for price in prices]
    found = list(pool.map(run, jobs))
    return [found[i : i + len(prices)] for i in range(0, len(found), len(prices))]

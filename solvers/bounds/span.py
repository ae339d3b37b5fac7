"""Bounds on span and messages that hold layer by layer: the columns' where there are any.

A bound on a figure is the sum over layers of the best one that is known for each of them: the
cheap one of `solvers.bounds.traffic`, or that of `solvers.bounds.columns`, which needs every slot
filled by an expert of its own. Where imbalance has a cap, `solvers.bounds.levels` makes use of it.
Pins and limits on moves only take placements away, so the bounds hold with them too. Messages with
coherent dispatch are twice the span, less one for the home rank and one for the rank of the primary
expert.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from solvers import check
from solvers.bounds.bound import Bound
from solvers.bounds.certifying import prover
from solvers.bounds.columns import MAX_WORK, PAIR_S, Columns, LayerTokens, RankLoads
from solvers.bounds.levels import Levels, priced
from solvers.bounds.load import rank_load_bound
from solvers.bounds.token_sets import TokenSets
from solvers.bounds.traffic import layer_bounds, traffic_bound
from solvers.bounds.transport import ROUNDING
from solvers.budget import Budget
from solvers.layers import anneal, prepare
from solvers.parallel import stopping
from solvers.problem import Problem
from solvers.solving import capped_imbalance

THREADS = 2
_PROPOSALS = 300  # times E, of a search for a placement to start from
_PRICES = (2.0, 8.0, 0.5, 0.0)  # of imbalance in these searches, in messages per token
_CUTS = (
    0.0,
    0.5,
    1.0,
    2.0,
    4.0,
)  # of imbalance above the least one, in units of what the cap allows
_LEAST_WIDTH = 0.02  # of that unit
_SEARCHES = 5  # of a layer, that an effort should suffice for
_ROUNDS, _GAIN = 40, 2e-4  # rounds with less relative gain than that end the search
_CHEAP, _COLUMNS = "transport problems", "column generation"

Floats = NDArray[np.float64]


@prover("span")
def span_cheaply(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Pairs that ranks have room for."""
    return _prove("span", problem, parts, None)


@prover("span")
def span_by_columns(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Column generation."""
    return _prove("span", problem, parts, budget)


@prover("messages_alltoall")
def messages_cheaply(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Pairs that ranks have room for, and experts that can be at the tokens' homes."""
    return _prove("messages_alltoall", problem, parts, None)


@prover("messages_alltoall")
def messages_by_columns(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Column generation."""
    return _prove("messages_alltoall", problem, parts, budget)


@prover("messages_coherent")
def coherent_cheaply(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Pairs and flow that ranks have room for."""
    return _prove("messages_coherent", problem, parts, None)


@prover("messages_coherent")
def coherent_by_columns(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Column generation for the span."""
    return _prove("messages_coherent", problem, parts, budget)


@prover("objective")
def traffic_by_columns(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Messages by columns, and messages between nodes by the pairs that these have room for."""
    figure = f"messages_{problem.dispatch}"
    if problem.objective != "traffic" or problem.link_cost is not None or figure not in parts:
        return None
    if problem.num_nodes == 1 or problem.num_workloads > 1:
        return None
    messages = _prove(figure, problem, parts, budget)
    both, alone = traffic_bound(problem), traffic_bound(replace(problem, node_weight=0.0))
    if messages is None or both is None or alone is None:
        return None
    lower = (messages.lower_bound + both - alone) * (1 - ROUNDING)
    value = check.objective(problem, parts)
    return replace(messages, figure="objective", value=value, lower_bound=lower)


def _prove(
    figure: str, problem: Problem, parts: dict[str, float], budget: Budget | None
) -> Bound | None:
    """A bound on one figure; a budget asks for columns."""
    if problem.tokens is None or figure not in parts:
        return None
    start = time.perf_counter()
    total, cap = float(layer_bounds(problem, figure).sum()), np.inf
    if budget is not None:
        if problem.max_imbalance is not None:
            cap = max(problem.max_imbalance, capped_imbalance(parts))
        found = columns_total(problem, figure, cap, budget)
        if found is None or found <= total:
            return None
        total = found
    lower = total / (len(problem.tokens) * problem.num_layers) * (1 - ROUNDING)
    return Bound(
        figure,
        parts[figure],
        max(0.0, lower),
        _CHEAP if budget is None else _COLUMNS,
        time.perf_counter() - start,
        None if cap == np.inf else cap,
    )


def columns_total(problem: Problem, figure: str, cap: float, budget: Budget) -> float | None:
    """Bound on a figure, summed over tokens and layers; None where columns prove nothing.

    Args:
        figure: span, messages_alltoall or messages_coherent.
        cap: on imbalance, see `solvers.bounds.levels`; infinite: none.
    """
    tokens = problem.tokens
    if tokens is None or problem.num_slots != problem.num_experts or problem.num_ranks == 1:
        return None
    by_home = figure == "messages_alltoall" and problem.home is not None
    # figure = scale x (what columns bound - less)
    scale, less = 1.0, np.zeros(problem.num_layers)
    if figure == "messages_coherent":
        # a token with experts goes to, and comes back from, span - 1 ranks or more
        scale, less = 2.0, (tokens >= 0).any(axis=2).sum(axis=0).astype(np.float64)
    elif figure == "messages_alltoall" and not by_home:
        scale = 1 - 1 / problem.num_ranks
    cheap = layer_bounds(problem, figure) / scale + less
    return scale * (column_bound(problem, by_home, cheap, cap, budget) - float(less.sum()))


def column_bound(
    problem: Problem, by_home: bool, cheap: Floats, cap: float, budget: Budget
) -> float:
    """Bound on the span, or the messages where tokens have homes, of all tokens and layers.

    Args:
        problem: every slot holds an expert of its own.
        by_home: whether ranks differ by whose home they are.
        cheap: [L] what is known of each layer.
        cap: on imbalance; infinite: none.
        budget: its effort is shared by the layers.
    """
    tokens, num_ranks, num_experts = problem.tokens, problem.num_ranks, problem.num_experts
    assert tokens is not None
    home = problem.home if by_home else None
    allowed = np.inf if budget.effort is None else budget.effort
    max_work = int(min(MAX_WORK, allowed / problem.num_layers / _SEARCHES / PAIR_S))
    plain = Problem(
        load=problem.load,
        num_ranks=num_ranks,
        slots_per_rank=problem.slots_per_rank,
        ranks_per_node=num_ranks,
        tokens=tokens,
        home=home,
        scenario_load=problem.scenario_load,
    )
    stop = np.zeros(1, np.int64)
    with stopping(stop, budget), ThreadPoolExecutor(THREADS) as pool:
        starts = annealed(plain, _PRICES if cap < np.inf else (0.0,), pool)

        def levels_of(layer: int) -> Levels | None:
            sets = TokenSets.of(tokens[:, layer], num_experts, home)
            if budget.expired() or not len(sets.weight):
                return None
            loads = rank_loads(problem, layer) if cap < np.inf else RankLoads.none(num_experts)
            layer_tokens = LayerTokens(sets, num_ranks, by_home, loads)
            columns = Columns(layer_tokens, starts[layer], max_work=max_work)
            lowest = float(loads.floor.sum())
            width = max(_LEAST_WIDTH, cap - lowest) if cap < np.inf else 0.0
            cuts = [lowest + width * part for part in (_CUTS if width else (0.0,))]
            return Levels(columns, float(cheap[layer]), cuts)

        layers = [level for level in pool.map(levels_of, range(problem.num_layers)) if level]
        known = float(cheap.sum()) - sum(level.cheap for level in layers)
        best, rounds, last = -np.inf, 0, -np.inf
        while True:
            price, found = priced(layers, cap, problem.num_layers)
            best = max(best, found)
            if rounds % _ROUNDS == 0:
                if best - last <= _GAIN * abs(best):
                    break
                last = best
            jobs = [(level, job) for level in layers if (job := level.job(price)) is not None]
            spent = sum(level.work for level in layers)
            if not jobs or spent >= allowed or budget.expired():
                break
            list(pool.map(lambda work: work[0].run(work[1], stop), jobs))
            rounds += 1
    return known + best


def rank_loads(problem: Problem, layer: int) -> RankLoads:
    """What a rank's load in a layer does to the imbalance that a cap is about.

    Several workloads count alike, which is at most what `robust` makes of them.
    """
    loads = problem.load[None] if problem.scenario_load is None else problem.scenario_load
    number = len(loads)
    workload = np.zeros(number, np.int64) if problem.workload is None else problem.workload
    weight = 1 / np.bincount(workload)[workload] / problem.num_workloads
    here = loads[:, layer]
    mean = here.sum(axis=1) / problem.num_ranks
    scaled = np.divide(weight, mean, out=np.zeros(number), where=mean > 0)
    busiest = np.array([rank_load_bound(problem, load[layer : layer + 1])[0] for load in loads])
    floor = np.where(mean > 0, busiest * scaled, weight)
    fastest = float(problem.fair_share.max())
    return RankLoads(here * scaled[:, None] / fastest, floor)


def annealed(
    problem: Problem, prices: Sequence[float], pool: ThreadPoolExecutor
) -> list[list[NDArray[np.int64]]]:
    """[layers][prices] quick placements [G, s] under prices of imbalance, in messages per token."""
    layers, width = prepare(problem), problem.slots_per_rank

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

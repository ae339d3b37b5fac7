"""Bounds on span and messages that hold layer by layer: the columns' where there are any.

A bound on a figure is the sum over layers of the best one that is known for each of them: the
cheap one of `solvers.bounds.traffic`, or that of `solvers.bounds.columns`, which needs every slot
filled by an expert of its own. Pins, caps and limits on moves only take placements away, so the
bounds hold with them too. Messages with coherent dispatch are twice the span, less one for the home
rank and one for the rank of the primary expert.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.bound import Bound
from solvers.bounds.certifying import prover
from solvers.bounds.columns import Columns
from solvers.bounds.token_sets import TokenSets
from solvers.bounds.traffic import layer_bounds
from solvers.bounds.transport import ROUNDING
from solvers.budget import Budget
from solvers.parallel import stopping
from solvers.problem import Problem

THREADS = 2
_PROPOSALS = 300  # times E, of the search for a placement to start from
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


def _prove(
    figure: str, problem: Problem, parts: dict[str, float], budget: Budget | None
) -> Bound | None:
    """A bound on one figure; a budget asks for columns."""
    if problem.tokens is None or figure not in parts:
        return None
    start = time.perf_counter()
    known = layer_bounds(problem, figure)
    if budget is not None:
        by_home = figure == "messages_alltoall" and problem.home is not None
        proven = column_bounds(problem, by_home, budget)
        if proven is None:
            return None
        if figure == "messages_coherent":
            # a token with experts goes to, and comes back from, span - 1 ranks or more
            active = (problem.tokens >= 0).any(axis=2).sum(axis=0)
            proven = 2 * (proven - active)
        elif figure == "messages_alltoall" and problem.home is None:
            proven = proven * (1 - 1 / problem.num_ranks)
        known = np.maximum(known, proven)
    lower = float(known.sum()) / (len(problem.tokens) * problem.num_layers) * (1 - ROUNDING)
    method = _CHEAP if budget is None else _COLUMNS
    return Bound(figure, parts[figure], max(0.0, lower), method, time.perf_counter() - start)


def column_bounds(problem: Problem, by_home: bool, budget: Budget) -> Floats | None:
    """[L] bounds on each layer's summed span, or messages where tokens have homes; None: no proof.

    -inf for a layer of which nothing is proven in time.
    """
    tokens, num_ranks = problem.tokens, problem.num_ranks
    if tokens is None or problem.num_slots != problem.num_experts or num_ranks == 1:
        return None
    home = problem.home if by_home else None
    stop = np.zeros(1, np.int64)
    plain = Problem(
        load=problem.load,
        num_ranks=num_ranks,
        slots_per_rank=problem.slots_per_rank,
        ranks_per_node=num_ranks,
        tokens=tokens,
        home=home,
    )
    with stopping(stop, budget), ThreadPoolExecutor(THREADS) as pool:
        starts = _starts(plain, pool)

        def prepare(layer: int) -> Columns | None:
            sets = TokenSets.of(tokens[:, layer], problem.num_experts, home)
            return Columns(sets, starts[layer], by_home) if len(sets.weight) else None

        prepared = list(pool.map(prepare, range(problem.num_layers)))
        live = [columns for columns in prepared if columns is not None]
        while live and not budget.expired():
            list(pool.map(lambda columns: columns.step(stop), live))
            live = [columns for columns in live if not columns.done]
    return np.array([0.0 if columns is None else columns.best for columns in prepared])


def _starts(problem: Problem, pool: ThreadPoolExecutor) -> list[NDArray[np.int64]]:
    """[G, s] a good placement of each layer."""
    from solvers.layers import anneal, prepare

    layers, width = prepare(problem), problem.slots_per_rank
    prices = layers.uniform_prices(0.0)

    def start(layer: int) -> NDArray[np.int64]:
        slots = anneal(
            layers, layer, layers.start(layer, width), width, prices,
            proposals=_PROPOSALS * problem.num_experts, seed=(0, layer),
        )  # fmt: skip
        return slots.reshape(problem.num_ranks, width)

    return list(pool.map(start, range(problem.num_layers)))

"""Lower bounds on the load of the busiest rank, and on imbalance.

Without redundant slots a rank holds exactly s experts. Among the kG + 1 hottest some rank holds
k + 1, so its load is at least that of the k + 1 coolest of them and of the s - k - 1 coolest of
all. With redundant slots: the least possible largest load per copy. Always: the mean.

Source: placer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.problem import Problem

Floats = NDArray[np.float64]


def rank_load_bound(problem: Problem, loads: Floats | None = None) -> Floats:
    """[L] load of the busiest rank, each rank's in units of what is fair for its speed.

    Args:
        problem: what is to be placed.
        loads: [L, E] in place of the problem's own.
    """
    loads = problem.load if loads is None else loads
    spare = problem.num_slots - problem.num_experts
    bound: Floats = loads.sum(axis=1) / problem.num_ranks
    fastest = float(problem.fair_share.max())
    for layer, load in enumerate(loads):
        if spare:
            busiest = _load_per_copy(load, spare, problem.num_ranks)
        else:
            busiest = _pigeonhole(load, problem.num_ranks)
        bound[layer] = max(bound[layer], busiest / fastest)
    return bound


def imbalance_bound(problem: Problem, loads: Floats | None = None) -> float:
    """Mean over layers of max / mean rank load."""
    loads = problem.load if loads is None else loads
    mean = loads.sum(axis=1) / problem.num_ranks
    bound = rank_load_bound(problem, loads)
    return float(np.divide(bound, mean, out=np.ones_like(mean), where=mean > 0).mean())


def scenario_imbalance_bound(problem: Problem) -> float:
    """Imbalance over the scenarios, each workload's counted by `robust`.

    With redundant slots the checker counts the pairs that copies serve where there are any copies,
    and `scenario_load` otherwise: the lower of the two bounds holds in both cases. However a copied
    expert's pairs are split, some copy serves an equal share or more.
    """
    assert problem.scenario_load is not None
    bound = _over_scenarios(problem, problem.scenario_load)
    if problem.num_slots > problem.num_experts and problem.scenario is not None:
        bound = min(bound, _over_scenarios(problem, _pairs_of_scenarios(problem)))
    return bound


def _over_scenarios(problem: Problem, loads: Floats) -> float:
    found = np.array([imbalance_bound(problem, load) for load in problem.judged(loads)])
    workload = problem.workload_of_judged
    return float(problem.aggregate(np.bincount(workload, found) / np.bincount(workload)))


def _pairs_of_scenarios(problem: Problem) -> Floats:
    """[C, L, E] token-expert pairs of `tokens` in each scenario."""
    assert problem.tokens is not None
    assert problem.scenario is not None
    assert problem.scenario_load is not None
    pairs = np.zeros(problem.scenario_load.shape)
    row, layer, column = np.nonzero(problem.tokens >= 0)
    np.add.at(pairs, (problem.scenario[row], layer, problem.tokens[row, layer, column]), 1.0)
    return pairs


def _pigeonhole(load: Floats, num_ranks: int) -> float:
    hottest = np.sort(load)[::-1]
    slots = load.size // num_ranks
    coolest = np.concatenate(([0.0], np.cumsum(hottest[::-1])))
    return max(
        float(hottest[k * num_ranks - k : k * num_ranks + 1].sum() + coolest[slots - k - 1])
        for k in range(slots)
    )


def _load_per_copy(load: Floats, spare: int, max_copies: int) -> float:
    """Least possible largest load per copy: each spare slot to where it is needed most."""
    copies = np.ones(load.size, np.int64)
    for _ in range(spare):
        hottest = int((load / copies).argmax())
        if copies[hottest] == max_copies:
            break
        copies[hottest] += 1
    return float((load / copies).max())

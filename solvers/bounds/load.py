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


def rank_load_bound(problem: Problem) -> Floats:
    """[L] load of the busiest rank."""
    spare = problem.num_slots - problem.num_experts
    bound: Floats = problem.load.sum(axis=1) / problem.num_ranks
    for layer, load in enumerate(problem.load):
        if spare:
            bound[layer] = max(bound[layer], _load_per_copy(load, spare, problem.num_ranks))
        else:
            bound[layer] = max(bound[layer], _pigeonhole(load, problem.num_ranks))
    return bound


def imbalance_bound(problem: Problem) -> float:
    """Mean over layers of max / mean rank load."""
    mean = problem.load.sum(axis=1) / problem.num_ranks
    bound = rank_load_bound(problem)
    return float(np.divide(bound, mean, out=np.ones_like(mean), where=mean > 0).mean())


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

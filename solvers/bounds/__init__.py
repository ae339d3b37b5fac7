"""Lower bounds that hold for every sound placement of a problem.

Each is proven on the very arrays from which `solvers.check` computes the value, for every choice of
copies where there are redundant slots. None uses the cap on imbalance, which could only raise them.

`load`, `transport` and `traffic` hold the cheap ones, which every result of `solvers.solve` has.
"""

from __future__ import annotations

from solvers.bounds.load import imbalance_bound, rank_load_bound, scenario_imbalance_bound
from solvers.bounds.traffic import traffic_bound
from solvers.bounds.transport import (
    ROUNDING,
    affinity_bound,
    coactivation_bound,
    kept_flow_bound,
    to_integers,
)
from solvers.budget import Budget
from solvers.check import num_tokens
from solvers.problem import Problem

__all__ = [
    "imbalance_bound",
    "kept_flow_bound",
    "lower_bound",
    "rank_load_bound",
    "to_integers",
    "traffic_bound",
]


def lower_bound(problem: Problem, budget: Budget | None = None) -> float | None:
    """A bound on the problem's objective; None if there is nothing to prove it on.

    A budget that ends leaves it lower, and as true.
    """
    if problem.objective == "balance":
        if problem.scenario_load is not None:
            return scenario_imbalance_bound(problem) * (1 - ROUNDING)
        return imbalance_bound(problem) * (1 - ROUNDING)
    if problem.objective == "affinity":
        return affinity_bound(problem)
    if problem.objective == "coactivation":
        return coactivation_bound(problem)
    traffic = traffic_bound(problem, budget)
    if traffic is None:
        return None
    if problem.objective == "latency":
        tokens_per_rank = num_tokens(problem) / problem.num_ranks
        traffic = (
            problem.latency_load_us * float(rank_load_bound(problem).mean())
            + problem.latency_message_us * traffic * tokens_per_rank
        )
    return max(0.0, traffic * (1 - ROUNDING))

"""What proves the best of pairwise problems, where they are small enough: the method by size.

| what | proven by | up to |
| --- | --- | --- |
| affinity | dynamic programming over partitions | 8 experts, 12 on 2 or 3 ranks, 10 on 5, 16 on 2 |
| affinity | the clique program of `solvers.published.exflow`, by CP-SAT | 16 experts x 4 layers |
| co-activation | depth-first search, layer by layer | 16 experts, more where few pairs dominate |

The first and the last are exact up to rounding, the program counts in integers, rounded up.
Experts must fill all slots, equally many on each rank. Source: placer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.chain import contiguous_ranks, effort_for, keep_flow
from solvers.exact_pairs import MOST_NODES, MOST_WORK, best_chain, best_groups, chain_work
from solvers.problem import Problem

Ranks = NDArray[np.int64]

MOST_EXPERTS = 32  # of a layer whose co-activation is searched
_SECONDS = 2e-9  # nominal, of a step of the dynamic programming


@dataclass(frozen=True, eq=False)
class Optimum:
    """A placement, and a bound that it meets, unless a program ended early.

    Attributes:
        ranks: [L, E] of each expert.
        kept: upper bound on the share of the pairs that any placement keeps within ranks.
        method: what proved it.
    """

    ranks: Ranks
    kept: float
    method: str


def prove(problem: Problem, figure: str, known: Ranks | None, budget: Budget) -> Optimum | None:
    """Solve a pairwise problem exactly; None where that is out of reach.

    Args:
        problem: what is to be placed, equally many experts on each rank.
        figure: "cross_rank_fraction" or "coactivation_cut".
        known: [L, E] ranks of a good placement, if there is one.
        budget: when to give up; by its effort also whether to begin.
    """
    if problem.num_slots != problem.num_experts or problem.num_ranks == 1:
        return None
    if figure == "cross_rank_fraction":
        return _prove_flow(problem, known, budget)
    if problem.num_experts > MOST_EXPERTS or problem.coactivation is None:
        return None
    together = problem.coactivation * (1.0 - np.eye(problem.num_experts))
    total = float(together.sum())
    if total <= 0:  # tokens use an expert each: nothing can be cut
        return None
    sizes = np.full(problem.num_ranks, problem.slots_per_rank)
    ranks = contiguous_ranks(problem.num_layers, sizes) if known is None else known.copy()
    for layer, pairs in enumerate(together):
        if budget.expired():
            return None
        found = best_groups(pairs, problem.num_ranks, ranks[layer], MOST_NODES // len(together))
        if found is None:
            return None
        ranks[layer] = found
    same = ranks[:, :, None] == ranks[:, None, :]
    kept = float((together * same).sum()) / total
    return Optimum(ranks, kept, "depth-first search")


def _prove_flow(problem: Problem, known: Ranks | None, budget: Budget) -> Optimum | None:
    from solvers.published.exflow import EFFORT, improve

    if problem.affinity is None or float(problem.affinity.sum()) <= 0:
        return None
    flow = np.ascontiguousarray(problem.affinity, dtype=np.float64)
    num_ranks, total = problem.num_ranks, float(flow.sum())
    num_layers, num_experts = problem.num_layers, problem.num_experts
    allowed = np.inf if budget.effort is None else budget.effort
    work = chain_work(num_layers, num_experts, num_ranks)
    if work <= MOST_WORK:
        found = best_chain(flow, num_ranks, budget) if work * _SECONDS <= allowed else None
        if found is None:
            return None
        kept = float((flow * (found[:-1, :, None] == found[1:, None, :])).sum())
        return Optimum(found, kept / total, "dynamic programming")
    if allowed < EFFORT or num_experts > MOST_EXPERTS:
        return None
    sizes = np.full(num_ranks, problem.slots_per_rank)
    if known is None:
        effort = effort_for(num_layers, num_experts, num_ranks)
        known = keep_flow(flow, sizes, np.random.default_rng(0), budget, effort)
    stage = improve(flow, sizes, known, budget, "cp_sat")
    if stage.upper_bound is None:
        return None
    return Optimum(stage.ranks, stage.upper_bound / total, "clique program")

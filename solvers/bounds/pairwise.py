"""Bounds on the cross-rank fraction and on the share of co-activated pairs that is cut.

Both figures are one less what stays within ranks, over the total, so an upper bound on what stays
is a lower bound on the figure. Three proofs:

- `transport`: integral b-matchings, cheap, also with redundant slots (`solvers.bounds.transport`);
- `exact`: the optimum itself, for few experts (`solvers.proving`);
- `relaxation`: doubly nonnegative with cuts (`solvers.bounds.relaxation`); where every
  slot holds an expert, so that each rank holds equally many of each layer. Much tighter.

Pins, caps and limits on moves only take placements away, so the bounds hold with them too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.bound import Bound
from solvers.bounds.certifying import prover
from solvers.bounds.relaxation import THREADS, Chain, bound_kept
from solvers.bounds.transport import affinity_bound, coactivation_bound, share_cut
from solvers.budget import Budget
from solvers.clock import working_s
from solvers.problem import Problem
from solvers.proving import prove

Floats = NDArray[np.float64]

AFFINITY, COACTIVATION = "cross_rank_fraction", "coactivation_cut"
MAX_ITERATIONS, MIN_ITERATIONS = 1000, 40
_HURRIED_ITERATIONS = 20  # fewer prove less than b-matchings
_SECONDS_PER_ENTRY = 1.1e-7  # nominal, of one iteration per entry of the matrices to decompose


def pairs_of(problem: Problem) -> Floats:
    """[L, E, E] co-activation without its diagonal."""
    assert problem.coactivation is not None
    return problem.coactivation * (1.0 - np.eye(problem.num_experts))


@prover(AFFINITY)
def affinity_by_transport(
    problem: Problem, parts: dict[str, float], budget: Budget
) -> Bound | None:
    """b-matchings of neighbouring layers."""
    if AFFINITY not in parts:
        return None
    start = working_s()
    return _bound(AFFINITY, parts, affinity_bound(problem, budget), "b-matching", start)


@prover(COACTIVATION)
def coactivation_by_transport(
    problem: Problem, parts: dict[str, float], budget: Budget
) -> Bound | None:
    """b-matchings within layers."""
    if COACTIVATION not in parts:
        return None
    start = working_s()
    return _bound(COACTIVATION, parts, coactivation_bound(problem, budget), "b-matching", start)


@prover(AFFINITY)
def affinity_exactly(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Dynamic programming or the clique program."""
    return _exact(AFFINITY, problem, parts, budget)


@prover(COACTIVATION)
def coactivation_exactly(problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    """Depth-first search of every layer."""
    return _exact(COACTIVATION, problem, parts, budget)


@prover(AFFINITY)
def affinity_by_relaxation(
    problem: Problem, parts: dict[str, float], budget: Budget
) -> Bound | None:
    """One chain of layers whose blocks are shared."""
    if AFFINITY not in parts or problem.affinity is None:
        return None
    within = np.zeros((problem.num_layers, problem.num_experts, problem.num_experts))
    chain = Chain(problem.num_ranks, within, problem.affinity)
    return _relax(AFFINITY, problem, chain, parts, budget)


@prover(COACTIVATION)
def coactivation_by_relaxation(
    problem: Problem, parts: dict[str, float], budget: Budget
) -> Bound | None:
    """Every layer by itself."""
    if COACTIVATION not in parts:
        return None
    chain = Chain(problem.num_ranks, pairs_of(problem))
    return _relax(COACTIVATION, problem, chain, parts, budget)


def _exact(figure: str, problem: Problem, parts: dict[str, float], budget: Budget) -> Bound | None:
    start = working_s()
    found = prove(problem, figure, None, budget) if figure in parts else None
    if found is None:
        return None
    return _bound(figure, parts, share_cut(found.kept, 1.0), found.method, start)


def _relax(
    figure: str, problem: Problem, chain: Chain, parts: dict[str, float], budget: Budget
) -> Bound | None:
    start = working_s()
    total = float((chain.together if chain.flow is None else chain.flow).sum())
    if problem.num_slots != problem.num_experts or problem.num_ranks == 1 or total <= 0:
        return None
    iterations = MAX_ITERATIONS
    nominal = _SECONDS_PER_ENTRY * chain.num_copies * (chain.blocks * chain.num_experts) ** 2
    if budget.effort is not None:
        iterations = min(iterations, int(budget.effort / nominal))
        if iterations < MIN_ITERATIONS:
            return None
    if budget.remaining() * THREADS < _HURRIED_ITERATIONS * nominal:
        return None
    proof = bound_kept(chain, budget, iterations, (1.0 - parts[figure]) * total)
    if proof is None:
        return None
    lower = share_cut(proof.kept, total)
    return _bound(figure, parts, lower, "doubly nonnegative relaxation", start)


def _bound(
    figure: str, parts: dict[str, float], lower: float | None, method: str, start: float
) -> Bound | None:
    if lower is None:
        return None
    return Bound(figure, parts[figure], lower, method, working_s() - start)

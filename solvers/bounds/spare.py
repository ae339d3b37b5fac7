"""Least span or messages where there are spare slots, bounded from below: all layers together.

See `solvers.bounds.copies` for the proof of a layer. The cap on imbalance is not used: the bound
holds under any. Source: placer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from solvers.bounds.copies import Copies, CopyTokens, expected_proof_s
from solvers.bounds.curve import THREADS, annealed, of_ranks, setup_s, terms
from solvers.bounds.token_sets import TokenSets
from solvers.budget import Budget
from solvers.parallel import stopping
from solvers.problem import Problem

_PROOFS = 1.0  # of a layer, that an effort should suffice for


def spare_total(
    problem: Problem, figure: str, cheap: NDArray[np.float64], budget: Budget
) -> float | None:
    """A bound on the sum over tokens and layers of a figure.

    Args:
        problem: with more slots than experts.
        figure: span, messages_alltoall or messages_coherent.
        cheap: [L] bounds on it, of all tokens of a layer.

    Returns:
        None where nothing more than `cheap` is proven, or only at too much effort; also where a
        rank can hold every expert, so that no token needs a second rank and `cheap` is met.
    """
    tokens, num_layers, num_experts = problem.tokens, problem.num_layers, problem.num_experts
    num_ranks, size = problem.num_ranks, problem.slots_per_rank
    if tokens is None or num_ranks == 1 or problem.num_slots == num_experts:
        return None
    if size >= num_experts:
        return None
    allowed = THREADS * budget.remaining()
    if budget.effort is not None:
        allowed = min(allowed, budget.effort)
    spent = setup_s(problem, 1)
    if allowed - spent < _PROOFS * num_layers * expected_proof_s(num_experts, size):
        return None
    if budget.effort is None:
        allowed = np.inf
    home, scale, less = terms(problem, figure)
    cheap = cheap / scale + less
    stop = np.zeros(1, np.int64)
    with stopping(stop, budget), ThreadPoolExecutor(THREADS) as pool:
        starts = annealed(of_ranks(problem, home), (0.0,), pool, stop)

        def copies_of(layer: int) -> Copies | None:
            sets = TokenSets.of(tokens[:, layer], num_experts, home)
            if budget.expired() or not len(sets.weight):
                return None
            layer_tokens = CopyTokens.of(sets, num_ranks, size, home is not None)
            return Copies(layer_tokens, starts[layer][0])

        layers = list(pool.map(copies_of, range(num_layers)))
        share = (allowed - spent) / num_layers  # each its own: more effort proves no less

        def work_on(layer: Copies) -> None:
            layer.round(share - layer.work, stop)

        while not budget.expired():
            work = [layer for layer in layers if layer and not layer.done and layer.work < share]
            if not work:
                break
            list(pool.map(work_on, work))
    found = np.array([-np.inf if layer is None else layer.best for layer in layers])
    if (found <= cheap).all():
        return None
    return scale * float((np.maximum(found, cheap) - less).sum())

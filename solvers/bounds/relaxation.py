"""A doubly nonnegative relaxation with cuts that are stars: how much can stay within ranks at most.

Problem: every rank holds s = E / G experts of each layer. M[u, v] = 1 if experts u and v, of one or
of two neighbouring layers, share a rank.

    maximise   sum_l <Q_l, M_l,l> + sum_l <C_l, M_l,l+1>

Relaxation. Write M for the experts of b layers (b = 1: one layer; b = 2: two neighbours, whose
blocks M_l,l are shared by both pairs that a layer belongs to), and V for an orthonormal basis of
what sums to zero over each layer. Every placement has

    (1)  M = J / G + V R V^T,   0 <= R <= b s I,   tr R = b s (G - 1)      rows sum to s; M is PSD
    (2)  0 <= M <= 1,   M_uu = 1
    (3)  sum over t in T of M_ut - sum over t, t' in T of M_tt' <= 1      stars: a centre u, 2 to
                                                                          5 leaves T; see `stars`

Bound. Let D_p be any symmetric matrix for each copy p of (1), and mu >= 0 a multiplier for each of
some stars (3), T mu its coefficients. With S = costs - (sum of D_p over copies) - T mu,

    bound = sum_p ( <D_p, J> / G + b s x (sum of the G - 1 largest eigenvalues of V^T D_p V) )
            + sum over u != v of max(S_uv, 0) + sum of S_uu + sum mu

is at least the optimum: the first line is the maximum of <D_p, M> over (1) (Ky Fan), the second of
the rest over (2) and (3). So the search for D and mu can stop at any time, and may be as inexact as
it likes; only `evaluate` has to be right. It is done in double precision, with all eigenvalues, and
raised by what rounding can amount to.

Search: the alternating direction method of multipliers (ADMM) on (1) | (2, 3), over-relaxed, in
single precision, one eigendecomposition a copy and iteration, on two threads. In the step for
(2, 3) a sweep of Hildreth's method over the known stars (exact ascent in each multiplier, the
entries clipped to [0, 1]) takes the place of an exact projection; multipliers carry over from one
iteration to the next. Now and then violated stars are looked for, and idle ones dropped.

Complexity: per iteration O(L E^3), and O(L E^3) for a separation; memory O(L E^2).

Sources: the matrix lifting and (1) as in Wolkowicz and Zhao, Semidefinite programming relaxations
for the graph partitioning problem, Discrete Applied Mathematics 96, 1999; safe bounds from any dual
point as in Jansson, Chaykin and Keil, SIAM Journal on Numerical Analysis 46, 2008. Sharing blocks
along a chain of layers: placer.
"""

from __future__ import annotations

import importlib
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import relaxation_kernels as kernels
from solvers.bounds.stars import (
    Rows,
    Stars,
    larger_violated,
    no_stars,
    violated_between,
    violated_within,
)
from solvers.budget import Budget

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

THREADS = 2
_EPSILON = float(np.finfo(np.float64).eps)
_ROUNDING = 1e-12  # of a sum, relative to the sum of absolute values
_OVER_RELAXATION = 1.6
_PENALTY = 0.7  # of x != y, where costs spread by one
_SEPARATE_FROM, _LARGER_FROM, _SEPARATE_EVERY = 5, 10, 5
_EVALUATE_EVERY = 10
_MET = 1e-9
_PATIENCE, _STALLED = 8, 2e-5  # evaluations without so much relative gain end the search


@dataclass(frozen=True, eq=False)
class Chain:
    """What may stay within ranks.

    Attributes:
        num_ranks: G; divides E.
        together: [L, E, E] Q, symmetric; the diagonal does not matter.
        flow: [L-1, E, E] C; None: layers have nothing to do with each other (b = 1).
    """

    num_ranks: int
    together: Floats
    flow: Floats | None = None

    @property
    def num_layers(self) -> int:
        return len(self.together)

    @property
    def num_experts(self) -> int:
        return int(self.together.shape[1])

    @property
    def capacity(self) -> int:
        """s."""
        return self.num_experts // self.num_ranks

    @property
    def blocks(self) -> int:
        """b."""
        return 1 if self.flow is None else 2

    @property
    def num_copies(self) -> int:
        """Of (1)."""
        return self.num_layers - self.blocks + 1

    @property
    def num_entries(self) -> int:
        between = 0 if self.flow is None else len(self.flow)
        return (self.num_layers + between) * self.num_experts**2


@dataclass(frozen=True, eq=False)
class Proof:
    """A dual point and what it proves.

    Attributes:
        kept: what stays within ranks is at most this.
        iterations: of the search.
        together: [L, E, E] how far experts of a layer share a rank in the relaxation's own point.
    """

    kept: float
    iterations: int
    together: Singles


def bound_kept(
    chain: Chain, budget: Budget, max_iterations: int, value: float | None = None
) -> Proof | None:
    """Bound what stays within ranks; None if the budget ends before anything is proven.

    Args:
        chain: what may stay.
        budget: when to stop.
        max_iterations: when to stop, on any machine alike.
        value: what a known placement keeps; a bound that meets it ends the search.
    """
    if budget.expired():
        return None
    from threadpoolctl import threadpool_limits

    # The threads are ours: BLAS threads within them would wait for each other. Only what is loaded
    # can be limited, and this is what the kernels call.
    importlib.import_module("scipy.linalg.cython_lapack")
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(THREADS) as pool:
        return _Search(chain, pool).run(budget, max_iterations, value)


class _Search:
    """State of the ADMM: y [P, bE, bE] in (1), x in (2, 3), the multipliers D of x = y.

    Costs are scaled so that they spread by one; `target` and `x` hold entries by their numbers, x
    with both halves of the blocks within a layer.
    """

    def __init__(self, chain: Chain, pool: ThreadPoolExecutor) -> None:
        self.chain, self.pool = chain, pool
        num_experts, num_layers = chain.num_experts, chain.num_layers
        self.upper = np.triu(np.ones((num_experts, num_experts), bool), 1)
        costs = np.where(self.upper, 2.0 * chain.together, 0.0)
        if chain.flow is not None:
            costs = np.concatenate([costs, chain.flow])
        self.scale = 1.0 / _spread(costs)
        self.costs = (costs * self.scale).astype(np.float32)
        share = 1.0 / chain.num_ranks
        size = chain.blocks * num_experts
        start = np.full((size, size), share) + (1 - share) * np.eye(size)
        self.y = np.tile(start.astype(np.float32), (chain.num_copies, 1, 1))
        self.dual = np.zeros_like(self.y)
        self.x = np.empty_like(self.costs)
        self.target = np.empty_like(self.costs)
        self.stars = Stars.of(no_stars(), num_layers, num_experts)
        layers = np.arange(num_layers)
        first, last = np.maximum(0, layers - chain.blocks + 1), np.minimum(layers, len(self.y) - 1)
        self.overlap = (last - first + 1).astype(np.float32)  # copies that a layer is in
        weight = np.full_like(self.costs, 2 * _PENALTY)
        weight[:num_layers] *= self.overlap[:, None, None]
        self.inverse: Singles = np.reciprocal(weight)

    def run(self, budget: Budget, max_iterations: int, value: float | None) -> Proof:
        best: tuple[float, Singles, Stars] | None = None
        stalled = iteration = 0
        took = 0.0
        while True:
            began = budget.remaining()
            self.step_entries()
            if iteration >= _SEPARATE_FROM and iteration % _SEPARATE_EVERY == 0:
                self.separate(larger=iteration >= _LARGER_FROM)
            answers = list(self.pool.map(self.project, range(len(self.y))))
            iteration += 1
            # what follows the last iteration takes about as long as two
            last = iteration >= max_iterations or budget.interrupted
            last = last or budget.remaining() <= 2 * took
            if iteration % _EVALUATE_EVERY == 0 or last:
                estimate = self.estimate(sum(answer[0] for answer in answers)) / self.scale
                gain = np.inf if best is None else (best[0] - estimate) / abs(best[0])
                stalled = 0 if gain > _STALLED else stalled + 1
                if best is None or gain > 0:
                    best = estimate, self.dual.copy(), self.stars.frozen()
                met = value is not None and best[0] <= value * (1 + _MET)
                if last or met or stalled >= _PATIENCE:
                    break
            took = max(took, began - budget.remaining()) if budget.seconds is not None else 0.0
        kept = evaluate(self.chain, best[1], best[2], self.scale, self.pool)
        return Proof(kept, iteration, self.x[: self.chain.num_layers].copy())

    def step_entries(self) -> None:
        """x: the point of (2, 3) nearest to y, in the direction of the costs."""
        chain = self.chain
        target, num_layers, num_experts = self.target, chain.num_layers, chain.num_experts
        pull = self.y - self.dual / _PENALTY
        within = target[:num_layers]
        within[:] = self.costs[:num_layers] / (2 * _PENALTY)
        for block in range(chain.blocks):
            here = slice(block * num_experts, (block + 1) * num_experts)
            within[block : block + len(pull)] += pull[:, here, here]
        within /= self.overlap[:, None, None]
        if chain.blocks == 2:
            between = target[num_layers:]
            between[:] = pull[:, :num_experts, num_experts:]
            between += self.costs[num_layers:] / (2 * _PENALTY)
        if len(self.stars.members):
            pressed = self.stars.coefficients(target.size).reshape(target.shape)
            target -= (pressed * self.inverse).astype(np.float32)
            self.stars.tighten(target.ravel(), self.inverse.ravel())
        np.clip(target, 0.0, 1.0, out=self.x)
        half = np.where(self.upper, self.x[:num_layers], 0.0)
        self.x[:num_layers] = half + half.transpose(0, 2, 1)
        diagonal = np.arange(num_experts)
        self.x[:num_layers, diagonal, diagonal] = 1.0

    def matrix(self, copy: int) -> Singles:
        """[bE, bE] what M is in x, for one copy of (1)."""
        if self.chain.blocks == 1:
            layer: Singles = self.x[copy]
            return layer
        between = self.x[self.chain.num_layers + copy]
        matrix: Singles = np.block([[self.x[copy], between], [between.T, self.x[copy + 1]]])
        return matrix

    def project(self, copy: int) -> tuple[float, int]:
        """y and D of one copy of (1); what `relaxation_kernels.project` tells."""
        chain = self.chain
        answer: tuple[float, int] = kernels.project(
            self.matrix(copy),
            self.y[copy],
            self.dual[copy],
            chain.capacity,
            chain.num_ranks,
            np.float32(_PENALTY),
            np.float32(_OVER_RELAXATION),
        )
        return answer

    def separate(self, larger: bool) -> None:
        """Look for violated triangles, and larger stars if asked to; drop idle ones."""
        chain = self.chain
        parts = list(self.pool.map(self.violated, range(chain.num_layers)))
        if larger:
            parts += self.pool.map(self.larger_violated, range(len(self.y)))
        found = np.concatenate(parts)
        self.stars = self.stars.renewed(found, chain.num_layers, chain.num_experts)

    def violated(self, layer: int) -> Rows:
        """[n, 6] the most violated triangles of a layer, and of it and the next one."""
        num_layers = self.chain.num_layers
        found = violated_within(self.x[layer], layer)
        if self.chain.blocks == 1 or layer + 1 == num_layers:
            return found
        between = self.x[num_layers + layer]
        more = violated_between(self.x[layer], between, self.x[layer + 1], layer)
        return np.concatenate([found, more])

    def larger_violated(self, copy: int) -> Rows:
        """[n, 6] the most violated larger stars of a copy of (1)."""
        return larger_violated(self.matrix(copy), copy, self.chain.num_experts)

    def estimate(self, spectral: float) -> float:
        """The bound of the current dual point, but for rounding."""
        return spectral + _rest(self.chain, self.costs, self.dual, self.stars)[0]


def evaluate(
    chain: Chain, dual: NDArray[np.floating], cuts: Stars, scale: float, pool: Executor
) -> float:
    """The bound that a dual point proves, raised by what rounding can amount to.

    Args:
        chain: what may stay.
        dual: [P, bE, bE] D, of the costs times `scale`.
        cuts: stars and their multipliers, of the same.
        scale: any positive number.
        pool: takes the copies.
    """
    upper = np.triu(np.ones((chain.num_experts, chain.num_experts), bool), 1)
    costs = np.where(upper, 2.0 * chain.together, 0.0)
    if chain.flow is not None:
        costs = np.concatenate([costs, chain.flow])
    parts = np.array(list(pool.map(lambda matrix: _spectral(chain, matrix), dual)))
    total, rounding = (float(part) for part in parts.sum(axis=0))
    rest, terms = _rest(chain, costs * scale, dual.astype(np.float64), cuts)
    rounding += _ROUNDING * (terms + abs(total))
    return (total + rest + rounding) / scale


def _spectral(chain: Chain, dual: NDArray[np.floating]) -> tuple[float, float]:
    """The largest <D, V R V^T> over (1) of a copy of D, and how inexact it can be."""
    size, num_ranks, num_experts = len(dual), chain.num_ranks, chain.num_experts
    matrix = dual.astype(np.float64)
    symmetric = (matrix + matrix.T) / 2
    blocks = symmetric.reshape(chain.blocks, num_experts, chain.blocks, num_experts)
    centred = blocks - blocks.mean(axis=1, keepdims=True)
    centred = (centred - centred.mean(axis=3, keepdims=True)).reshape(size, size)
    # the vectors that do not sum to zero get an eigenvalue below all others
    norm = float(np.linalg.norm(centred)) + 1e-300
    away = np.kron(np.eye(chain.blocks), np.full((num_experts, num_experts), 1 / num_experts))
    values = np.linalg.eigvalsh(centred - 2 * norm * away)
    largest = size // num_ranks  # b s
    rounding = largest * (num_ranks - 1) * 100 * size * _EPSILON * norm
    return largest * float(values[size - num_ranks + 1 :].sum()), rounding


def _rest(
    chain: Chain, costs: NDArray[np.floating], dual: NDArray[np.floating], cuts: Stars
) -> tuple[float, float]:
    """All of the bound but the eigenvalues, and the sum of the absolute values of its terms."""
    num_layers, num_experts = chain.num_layers, chain.num_experts
    coefficients = cuts.coefficients(costs.size).reshape(costs.shape)
    overlapping = np.zeros((num_layers, num_experts, num_experts))
    for block in range(chain.blocks):
        here = slice(block * num_experts, (block + 1) * num_experts)
        overlapping[block : block + len(dual)] += dual[:, here, here]
    symmetric = overlapping + overlapping.transpose(0, 2, 1)
    upper = np.triu(np.ones((num_experts, num_experts), bool), 1)
    within = costs[:num_layers] - symmetric - coefficients[:num_layers]
    terms = [
        np.where(upper, np.maximum(within, 0.0), 0.0),
        -np.trace(overlapping, axis1=1, axis2=2),
        cuts.multiplier.astype(np.float64),
        dual.sum(axis=(1, 2), dtype=np.float64) / chain.num_ranks,
    ]
    if chain.blocks == 2:
        off = dual[:, :num_experts, num_experts:] + dual[:, num_experts:, :num_experts].transpose(
            0, 2, 1
        )
        terms.append(np.maximum(costs[num_layers:] - off - coefficients[num_layers:], 0.0))
    total = sum(float(term.sum(dtype=np.float64)) for term in terms)
    size = float(np.abs(costs).sum() + np.abs(dual).sum(dtype=np.float64))
    size += float((1 + cuts.leaves * (cuts.leaves + 1) / 2) @ terms[2])
    return total, size


def _spread(costs: Floats) -> float:
    """Standard deviation of the costs within rows and columns."""
    centred = costs - costs.mean(axis=1, keepdims=True)
    centred -= centred.mean(axis=2, keepdims=True)
    return max(1e-300, float(centred[np.abs(costs).sum(axis=(1, 2)) > 0].std()))

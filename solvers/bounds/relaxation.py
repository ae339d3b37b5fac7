"""A doubly nonnegative relaxation with triangle cuts: how much can stay within ranks at most.

Problem: every rank holds s = E / G experts of each layer. M[u, v] = 1 if experts u and v, of one or
of two neighbouring layers, share a rank.

    maximise   sum_l <Q_l, M_l,l> + sum_l <C_l, M_l,l+1>

Relaxation. Write M for the experts of b layers (b = 1: one layer; b = 2: two neighbours, whose
blocks M_l,l are shared by both pairs that a layer belongs to), and V for an orthonormal basis of
what sums to zero over each layer. Every placement has

    (1)  M = J / G + V R V^T,   0 <= R <= b s I,   tr R = b s (G - 1)      rows sum to s; M is PSD
    (2)  0 <= M <= 1,   M_uu = 1
    (3)  M_uv + M_vw - M_uw <= 1                                          sharing is transitive

Bound. Let D_p be any symmetric matrix for each copy p of (1), and mu >= 0 a multiplier for each of
some triangles (3), T mu its coefficients. With S = costs - (sum of D_p over copies) - T mu,

    bound = sum_p ( <D_p, J> / G + b s x (sum of the G - 1 largest eigenvalues of V^T D_p V) )
            + sum over u != v of max(S_uv, 0) + sum of S_uu + sum mu

is at least the optimum: the first line is the maximum of <D_p, M> over (1) (Ky Fan), the second of
the rest over (2) and (3). So the search for D and mu can stop at any time, and may be as inexact as
it likes; only `evaluate` has to be right. It is done in double precision, with all eigenvalues, and
raised by what rounding can amount to.

Search: the alternating direction method of multipliers (ADMM) on (1) | (2, 3), over-relaxed, in
single precision, one eigendecomposition a copy and iteration, on two threads. In the step for
(2, 3) a sweep of Hildreth's method over the known triangles (exact ascent in each multiplier, the
entries clipped to [0, 1]) takes the place of an exact projection; multipliers carry over from one
iteration to the next. Triangles are separated in full now and then: for each pair u, w the most
violated v.

Complexity: per iteration O(L E^3), and O(L E^3) for a separation; memory O(L E^2).

Sources: the matrix lifting and (1) as in Wolkowicz and Zhao, Semidefinite programming relaxations
for the graph partitioning problem, Discrete Applied Mathematics 96, 1999; safe bounds from any dual
point as in Jansson, Chaykin and Keil, SIAM Journal on Numerical Analysis 46, 2008; (3) from
Groetschel and Wakabayashi, A cutting plane algorithm for a clustering problem, Mathematical
Programming 45, 1989. Sharing blocks along a chain of layers: placer.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import relaxation_kernels as kernels
from solvers.budget import Budget

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Entries = NDArray[np.int64]

THREADS = 2
_EPSILON = float(np.finfo(np.float64).eps)
_ROUNDING = 1e-12  # of a sum, relative to the sum of absolute values
_OVER_RELAXATION = 1.6
_PENALTY = 0.7  # of x != y, where costs spread by one
_CUTS_WITHIN, _CUTS_BETWEEN = 12, 48  # new ones per separation, times E
_SEPARATE_FROM, _SEPARATE_EVERY = 5, 5
_LEAST_VIOLATION = 0.02
_KEPT_ROUNDS = 12  # of separation, that a triangle without a multiplier survives
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
class Triangles:
    """Cuts x[p] + x[q] - x[r] <= 1 on entries numbered as in `relaxation_kernels`.

    Attributes:
        entries: [N, 3] p, q, r.
        multiplier: [N] mu.
        age: [N] separations since the multiplier was last positive.
    """

    entries: Entries = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    multiplier: Singles = field(default_factory=lambda: np.zeros(0, np.float32))
    age: Entries = field(default_factory=lambda: np.zeros(0, np.int64))

    def frozen(self) -> Triangles:
        """A copy, which the search does not change."""
        return Triangles(self.entries, self.multiplier.copy(), self.age)

    def coefficients(self, num_entries: int) -> Floats:
        """[num_entries] T mu."""
        total = np.zeros(num_entries)
        for column, sign in ((0, 1.0), (1, 1.0), (2, -1.0)):
            total += sign * np.bincount(self.entries[:, column], self.multiplier, num_entries)
        return total

    def renewed(self, found: Entries, num_entries: int) -> Triangles:
        """Without those that have long been idle, and with those that were found."""
        age = np.where(self.multiplier > 0, 0, self.age + 1)
        kept = age < _KEPT_ROUNDS
        entries = np.concatenate([self.entries[kept], found])
        multiplier = np.concatenate([self.multiplier[kept], np.zeros(len(found), np.float32)])
        age = np.concatenate([age[kept], np.zeros(len(found), np.int64)])
        # two sides of a triangle tell the third
        key = entries[:, :2].min(axis=1) * num_entries + entries[:, :2].max(axis=1)
        _, first = np.unique(key, return_index=True)
        return Triangles(entries[first], multiplier[first], age[first])


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
        self.triangles = Triangles()
        layers = np.arange(num_layers)
        first, last = np.maximum(0, layers - chain.blocks + 1), np.minimum(layers, len(self.y) - 1)
        self.overlap = (last - first + 1).astype(np.float32)  # copies that a layer is in
        self.weight = np.full_like(self.costs, 2 * _PENALTY)
        self.weight[:num_layers] *= self.overlap[:, None, None]

    def run(self, budget: Budget, max_iterations: int, value: float | None) -> Proof:
        best: tuple[float, Singles, Triangles] | None = None
        stalled = iteration = 0
        took = 0.0
        while True:
            began = budget.remaining()
            self.step_entries()
            if iteration >= _SEPARATE_FROM and iteration % _SEPARATE_EVERY == 0:
                self.separate()
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
                    best = estimate, self.dual.copy(), self.triangles.frozen()
                met = value is not None and best[0] <= value * (1 + _MET)
                if last or met or stalled >= _PATIENCE:
                    break
            took = max(took, began - budget.remaining()) if budget.seconds is not None else 0.0
        kept = evaluate(self.chain, best[1], best[2], self.scale)
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
        cuts = self.triangles
        if len(cuts.entries):
            weight = self.weight
            target -= (cuts.coefficients(target.size).reshape(target.shape) / weight).astype(
                np.float32
            )
            p, q, r = (np.ascontiguousarray(column) for column in cuts.entries.T)
            kernels.tighten(target.ravel(), weight.ravel(), p, q, r, cuts.multiplier)
        np.clip(target, 0.0, 1.0, out=self.x)
        half = np.where(self.upper, self.x[:num_layers], 0.0)
        self.x[:num_layers] = half + half.transpose(0, 2, 1)
        diagonal = np.arange(num_experts)
        self.x[:num_layers, diagonal, diagonal] = 1.0

    def project(self, copy: int) -> tuple[float, int]:
        """y and D of one copy of (1); what `relaxation_kernels.project` tells."""
        chain = self.chain
        blocks = self.x[copy]
        if chain.blocks == 2:
            between = self.x[chain.num_layers + copy]
            blocks = np.block([[blocks, between], [between.T, self.x[copy + 1]]])
        answer: tuple[float, int] = kernels.project(
            np.ascontiguousarray(blocks),
            self.y[copy],
            self.dual[copy],
            chain.capacity,
            chain.num_ranks,
            np.float32(_PENALTY),
            np.float32(_OVER_RELAXATION),
        )
        return answer

    def separate(self) -> None:
        """Look for violated triangles; drop idle ones."""
        found = list(self.pool.map(self.violated, range(self.chain.num_layers)))
        self.triangles = self.triangles.renewed(np.concatenate(found), self.x.size)

    def violated(self, layer: int) -> Entries:
        """[n, 3] the most violated triangles of a layer, and of it and the next one."""
        num_experts, num_layers = self.chain.num_experts, self.chain.num_layers
        square = num_experts**2
        pairs = num_experts * (num_experts - 1) // 2
        found = np.empty((6 * pairs, 3), np.int64)
        violation = np.empty(len(found), np.float32)
        same, offset, least = self.x[layer], layer * square, np.float32(_LEAST_VIOLATION)
        count = kernels.triangles_within(same, offset, least, found, violation)
        chosen = [_most(found[:count], violation[:count], _CUTS_WITHIN * num_experts)]
        if self.chain.blocks == 2 and layer + 1 < num_layers:
            between = self.x[num_layers + layer]
            start = (num_layers + layer) * square
            count = kernels.triangles_between(
                same, between, offset, start, False, least, found, violation, 0
            )
            count = kernels.triangles_between(
                self.x[layer + 1],
                np.ascontiguousarray(between.T),
                offset + square,
                start,
                True,
                least,
                found,
                violation,
                count,
            )
            chosen.append(_most(found[:count], violation[:count], _CUTS_BETWEEN * num_experts))
        return np.concatenate(chosen)

    def estimate(self, spectral: float) -> float:
        """The bound of the current dual point, but for rounding."""
        return spectral + _rest(self.chain, self.costs, self.dual, self.triangles)[0]


def evaluate(chain: Chain, dual: NDArray[np.floating], cuts: Triangles, scale: float) -> float:
    """The bound that a dual point proves, raised by what rounding can amount to.

    Args:
        chain: what may stay.
        dual: [P, bE, bE] D, of the costs times `scale`.
        cuts: triangles and their multipliers, of the same.
        scale: any positive number.
    """
    size, num_ranks, num_experts = dual.shape[1], chain.num_ranks, chain.num_experts
    largest = size // num_ranks  # b s
    upper = np.triu(np.ones((num_experts, num_experts), bool), 1)
    costs = np.where(upper, 2.0 * chain.together, 0.0)
    if chain.flow is not None:
        costs = np.concatenate([costs, chain.flow])
    costs = costs * scale
    total, rounding = 0.0, 0.0
    for matrix in dual.astype(np.float64):
        symmetric = (matrix + matrix.T) / 2
        blocks = symmetric.reshape(chain.blocks, num_experts, chain.blocks, num_experts)
        centred = blocks - blocks.mean(axis=1, keepdims=True)
        centred = (centred - centred.mean(axis=3, keepdims=True)).reshape(size, size)
        # the vectors that do not sum to zero get an eigenvalue below all others
        norm = float(np.linalg.norm(centred)) + 1e-300
        away = np.kron(np.eye(chain.blocks), np.full((num_experts, num_experts), 1 / num_experts))
        values = np.linalg.eigvalsh(centred - 2 * norm * away)
        total += largest * float(values[size - num_ranks + 1 :].sum())
        rounding += largest * (num_ranks - 1) * 100 * size * _EPSILON * norm
    rest, terms = _rest(chain, costs, dual.astype(np.float64), cuts)
    rounding += _ROUNDING * (terms + abs(total))
    return (total + rest + rounding) / scale


def _rest(
    chain: Chain, costs: NDArray[np.floating], dual: NDArray[np.floating], cuts: Triangles
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
    size = float(np.abs(costs).sum() + np.abs(dual).sum(dtype=np.float64) + 3 * terms[2].sum())
    return total, size


def _most(found: Entries, violation: Singles, number: int) -> Entries:
    """The `number` most violated ones."""
    if len(found) > number:
        found = found[np.argpartition(-violation, number)[:number]]
    return found.copy()


def _spread(costs: Floats) -> float:
    """Standard deviation of the costs within rows and columns."""
    centred = costs - costs.mean(axis=1, keepdims=True)
    centred -= centred.mean(axis=2, keepdims=True)
    return max(1e-300, float(centred[np.abs(costs).sum(axis=(1, 2)) > 0].std()))

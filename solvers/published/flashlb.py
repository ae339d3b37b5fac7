"""FlashLB: balance mean and variance of the ranks' loads, replicas found by a tree search.

Problem: copies of experts to slots for loads x_t[e] of windows t = 1..T. With m the mean and C the
covariance of the loads over the windows, and c_e copies of expert e, a rank that holds D is worth
its risk

    sum_{e in D} m_e / c_e + z sqrt( sum_{e, f in D} C_ef / (c_e c_f) ),    z = 0.674,

z being the upper quartile of the normal distribution. What a deployment is judged by, though, is
the mean over the windows of max / mean rank load.

Method, for one layer:

1. Windows: consecutive batches are summed so that there are at most 64; every load gets 1 per
   batch, so that nothing is 0.
2. Experts in order of m + z sqrt(C_ee), in `DEPTH` = 4 intervals. For all intervals but the last,
   the number of replicas that the interval gets is searched for within `WIDTH` = 8 of what the
   min-max rule gives it; the rule (a replica to the largest (m + z sqrt(C_ee)) / c_e) spreads the
   interval's replicas over its experts and the remaining ones over the rest. Each trial is deployed
   and judged.
3. Deployment: copies, heaviest first, to the rank with room whose risk would be least.

Steps are `Problem.batch`. Differences from the original: it re-balances only layers whose balance
has got worse, and renames ranks to move fewer experts, both left out here, where there is nothing
running; where it gives up because an expert would be twice on a rank, here the copy is left out.

Complexity: O(L DEPTH WIDTH (S G K + T S)), K slots of a rank. Guarantee: none.

Source: vllm-ascend (August 2026), vllm_ascend/eplb/core/policy/policy_flashlb.py
(`FlashTree.optimize_balanceness`, `lpt_deployment`, `min_max_replica`, `compute_score`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.batch_loads import load_over_batches
from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import NoSolutionFound, Solution

Z = 0.6744897501960817  # 75 % quantile of the standard normal distribution
DEPTH, WIDTH, NUM_WINDOWS = 4, 8, 64

Counts = NDArray[np.int64]


@register(
    "flashlb",
    source="vllm-ascend policy_flashlb.py",
    needs=("tokens", "batch"),
    replicates=True,
)
def flashlb(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Balance mean and variance of load over batches; replicas by a tree search."""
    loads = windows(load_over_batches(problem) + 1.0)
    placement = np.empty((problem.num_layers, problem.num_slots), np.int64)
    for layer in range(problem.num_layers):
        if budget.expired():
            raise NoSolutionFound("the time limit passed before every layer was deployed")
        search = Search(loads[:, layer], problem.num_ranks, problem.slots_per_rank)
        placement[layer] = search.run().ravel()
    return Solution(placement, notes={"windows": len(loads)})


def windows(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, L, E] sums of equally many consecutive batches, T at most 64; the oldest may be left out.

    Args:
        loads: [B, L, E] of each batch.
    """
    width = max(len(loads) // NUM_WINDOWS, 1)
    latest = loads[-min(len(loads), width * NUM_WINDOWS) :]
    latest = latest[len(latest) % width :]
    summed: NDArray[np.float64] = latest.reshape(-1, width, *loads.shape[1:]).sum(axis=1)
    return summed


class Search:
    """The tree search for one layer.

    Args:
        loads: [T, E] in each window.
        num_ranks: G.
        num_slots: of one rank.
    """

    def __init__(self, loads: NDArray[np.float64], num_ranks: int, num_slots: int) -> None:
        num_windows, num_experts = loads.shape
        self.loads = np.ascontiguousarray(loads)
        self.num_ranks, self.num_slots = num_ranks, num_slots
        self.mean = loads.mean(axis=0)
        centred = loads - self.mean
        self.covariance = centred.T @ centred / max(1, num_windows - 1)
        self.worth = self.mean + Z * np.sqrt(self.covariance.diagonal())
        self.num_spare = min(num_ranks * num_slots, num_experts * num_ranks) - num_experts

    def run(self) -> NDArray[np.int64]:
        """[G, num_slots] expert of each slot, -1 = empty."""
        num_experts, spare = self.mean.size, self.num_spare
        order = np.argsort(-self.worth, kind="stable")
        interval = -(-num_experts // DEPTH)
        copies = np.ones(num_experts, np.int64)
        for level in range(DEPTH - 1):
            here = order[level * interval : (level + 1) * interval]
            rest = order[(level + 1) * interval :]
            of_here, of_rest = self.spread(here, spare), self.spread(rest, spare)
            both = self.spread(order[level * interval :], spare)[-1]
            low = max(0, spare - (len(of_rest) - 1))
            high = len(of_here) - 1
            first = min(max(int((both[: here.size] - 1).sum()), low), high)
            best, best_score = first, np.inf
            for number in _around(first, low, high):
                copies[here], copies[rest] = of_here[number], of_rest[spare - number]
                score = self.score(copies)
                if score < best_score:
                    best, best_score = number, score
            spare -= best
            copies[here], copies[rest] = of_here[best], of_rest[spare]
            if spare == 0 or rest.size == 0:
                break
        return self.deploy(copies)

    def spread(self, experts: NDArray[np.int64], spare: int) -> list[Counts]:
        """Copies of `experts` when they get 0, 1, ... replicas, by the min-max rule."""
        copies = np.ones(experts.size, np.int64)
        history = [copies.copy()]
        while len(history) <= spare and (copies < self.num_ranks).any():
            share = np.where(copies < self.num_ranks, self.worth[experts] / copies, -1.0)
            copies[share.argmax()] += 1
            history.append(copies.copy())
        return history

    def deploy(self, copies: Counts) -> NDArray[np.int64]:
        """[G, num_slots] the copies [E] on ranks, by risk."""
        from solvers.published.flashlb_kernels import deploy

        table: NDArray[np.int64] = deploy(
            self.mean, self.covariance, copies, self.num_ranks, self.num_slots, Z
        )
        return table

    def score(self, copies: Counts) -> float:
        """Mean over the windows of max / mean rank load, of the copies [E] deployed by risk."""
        from solvers.published.flashlb_kernels import score

        return float(score(self.loads, self.deploy(copies)))


def _around(first: int, low: int, high: int) -> list[int]:
    """Numbers within WIDTH of `first` and the limits, nearest first, the lower of two before."""
    found = [first]
    for distance in range(1, WIDTH + 1):
        found += [n for n in (first - distance, first + distance) if low <= n <= high]
    return found

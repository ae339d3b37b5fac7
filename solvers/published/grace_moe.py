"""GRACE-MoE: groups of co-activated experts of unequal size, and replicas of what is hot in them.

Problem: groups of experts for the nodes and, in each node, for its ranks, so that experts that fire
together share one; then replicas that take load off the busiest rank. A_ij is the number of tokens
that chose both i and j.

Method, for one layer:

1. Nodes: spectral clustering of A into as many groups as nodes (normalised Laplacian, k-means on
   the rows of its first eigenvectors, scaled to length 1); sizes as they come, as far as a
   node's slots allow.
2. Ranks of a node: spectral clustering into as many groups as ranks, then sizes within [E' - d,
   E' + d], E' = experts of the node / ranks, d = max(1, E' r) (Algorithm 2): a group that is too
   large keeps the experts with the largest affinity to it; the others go one by one to the
   group with room that they have most affinity to; a group that is too small takes from larger
   ones the experts that have least affinity to their own.
3. r: of 0, 0.05, ..., 0.5 the knee of the curve of U(r), the share of A within groups (1), over
   S(r), the standard deviation of the group sizes (2): the point farthest above the chord.
4. Replicas: with W_g the load of group g, rho = max W / mean W and n = min(max(1, floor(rho)), G-1)
   (3), the hot experts of the busiest rank, by load, the fewest that carry max W n / (1 + n), get a
   copy on each of the n least loaded ranks.

What the paper leaves open: slots. Groups are no larger than slots_per_rank, so without redundant
slots all have equal sizes and there are no replicas; hot experts are copied in order of load where
a slot is free. One r per layer, from its own curve, over all nodes; it is the knee of 11 values.

Complexity: O(L E^3). Guarantee: none.

Source: Han et al., GRACE-MoE: Grouping and Replication with Locality-Aware Routing for Efficient
Distributed MoE Inference, arXiv 2509.25041v4, sections 4.1 and 4.2, Algorithms 1 and 2. Its routing
(a local copy first, then the node's) is `placer`'s policy for any plan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.packing import place_groups
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import NoSolutionFound, Solution
from solvers.spectral import spectral_clusters

RATIOS = tuple(round(0.05 * step, 2) for step in range(11))

Matrix = NDArray[np.float64]
Groups = NDArray[np.int64]


@register(
    "grace_moe", source="GRACE-MoE (arXiv 2509.25041)", needs=("coactivation",), replicates=True
)
def grace_moe(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Cluster co-activated experts to nodes, then ranks, of unequal size; replicate what is hot."""
    assert problem.coactivation is not None
    groups = np.empty((problem.num_layers, problem.num_experts), np.int64)
    ratios = []
    for layer, together in enumerate(problem.coactivation):
        if budget.expired():
            raise NoSolutionFound("the time limit passed before every layer was grouped")
        affinity = together - np.diag(np.diag(together))
        rng = np.random.default_rng([seed, layer])
        groups[layer], ratio = group(problem, affinity, rng)
        ratios.append(ratio)
    placement = place_groups(groups, problem.num_ranks, problem.slots_per_rank)
    table = placement.reshape(problem.num_layers, problem.num_ranks, -1)
    num_replicas = sum(
        replicate_hot(table[layer], problem.load[layer]) for layer in range(problem.num_layers)
    )
    return Solution(
        placement, notes={"mean_ratio": float(np.mean(ratios)), "replicas": num_replicas}
    )


def group(problem: Problem, affinity: Matrix, rng: np.random.Generator) -> tuple[Groups, float]:
    """Steps 1 to 3: [E] rank of each expert, and the ratio r.

    Args:
        problem: for its nodes, ranks and slots.
        affinity: [E, E] tokens that chose both, 0 on the diagonal.
    """
    num_nodes, ranks_per_node = problem.num_nodes, problem.ranks_per_node
    node_slots = ranks_per_node * problem.slots_per_rank
    nodes = spectral_clusters(affinity, num_nodes, rng)
    fewest = int(problem.num_experts >= num_nodes)
    nodes = bound_sizes(affinity, nodes, num_nodes, fewest, node_slots)
    members = [np.nonzero(nodes == node)[0] for node in range(num_nodes)]
    inside = [affinity[np.ix_(held, held)] for held in members]
    clusters = [spectral_clusters(within, ranks_per_node, rng) for within in inside]

    def with_ratio(ratio: float) -> Groups:
        ranks = np.empty(problem.num_experts, np.int64)
        for node, held in enumerate(members):
            mean = held.size / ranks_per_node
            spread = max(1, round(mean * ratio)) if ratio > 0 else 0
            low = max(int(held.size >= ranks_per_node), int(mean) - spread)
            high = min(problem.slots_per_rank, -int(-mean // 1) + spread)
            bounded = bound_sizes(inside[node], clusters[node], ranks_per_node, low, high)
            ranks[held] = bounded + node * ranks_per_node
        return ranks

    tried = [with_ratio(ratio) for ratio in RATIOS]
    best = knee(
        [(_deviation(ranks, problem.num_ranks), _within(affinity, ranks)) for ranks in tried]
    )
    return tried[best], RATIOS[best]


def bound_sizes(affinity: Matrix, groups: Groups, num_groups: int, low: int, high: int) -> Groups:
    """[n] the groups with sizes within low..high (Algorithm 2).

    Args:
        affinity: [n, n].
        groups: [n] group of each item.
        low, high: num_groups * low <= n <= num_groups * high.
    """
    groups = groups.copy()
    inside = _affinity_to(affinity, groups, num_groups)
    homeless = []
    for number in range(num_groups):
        members = np.nonzero(groups == number)[0]
        if members.size > high:
            order = members[np.argsort(-inside[members, number], kind="stable")]
            homeless += order[high:].tolist()
    groups[homeless] = -1
    for item in homeless:
        size = np.bincount(groups[groups >= 0], minlength=num_groups)
        attraction = _affinity_to(affinity[item : item + 1], groups, num_groups)[0]
        groups[item] = np.where(size < high, attraction, -np.inf).argmax()
    while True:
        size = np.bincount(groups, minlength=num_groups)
        needy = int(size.argmin())
        if size[needy] >= low:
            return groups
        inside = _affinity_to(affinity, groups, num_groups)
        own = inside[np.arange(groups.size), groups]
        groups[np.where(size[groups] > low, own, np.inf).argmin()] = needy


def knee(points: list[tuple[float, float]]) -> int:
    """The point farthest above the chord from the first to the last, of equal ones the first.

    Args:
        points: (size deviation, affinity within groups).
    """
    x, y = np.array(points).T
    first, last = int(x.argmin()), int(x.argmax())
    width, height = x[last] - x[first], y.max() - y.min()
    if width <= 0 or height <= 0:
        return int(y.argmax())
    return int((((y - y[first]) / height) - ((x - x[first]) / width)).argmax())


def replicate_hot(table: NDArray[np.int64], load: NDArray[np.float64]) -> int:
    """Step 4, in place on `table` [G, K]; the number of copies made.

    Args:
        load: [E].
    """
    num_ranks = len(table)
    weight = np.where(table >= 0, load[table], 0.0)
    total = weight.sum(axis=1)
    if num_ranks == 1 or total.max() <= 0:
        return 0
    busiest = int(total.argmax())
    num_replicas = min(max(1, int(total[busiest] / total.mean())), num_ranks - 1)
    order = np.argsort(-weight[busiest], kind="stable")
    carried = weight[busiest, order].cumsum()
    enough = int((carried < total[busiest] * num_replicas / (1 + num_replicas)).sum()) + 1
    hot = [int(table[busiest, slot]) for slot in order[:enough] if table[busiest, slot] >= 0]
    lightest = [int(rank) for rank in np.argsort(total, kind="stable") if rank != busiest]
    num_copies = 0
    for expert in hot:
        for rank in lightest[:num_replicas]:
            free = np.nonzero(table[rank] < 0)[0]
            if free.size:
                table[rank, free[0]] = expert
                num_copies += 1
    return num_copies


def _affinity_to(affinity: Matrix, groups: Groups, num_groups: int) -> Matrix:
    """[n, num_groups] affinity of each row to the members of each group; -1 is no group."""
    member = groups[:, None] == np.arange(num_groups)
    total: Matrix = affinity @ member.astype(np.float64)
    return total


def _within(affinity: Matrix, groups: Groups) -> float:
    """U: share of the affinity that is within groups (1)."""
    total = float(affinity.sum())
    same = groups[:, None] == groups
    return float((affinity * same).sum()) / total if total > 0 else 0.0


def _deviation(groups: Groups, num_groups: int) -> float:
    """S: standard deviation of the group sizes (2)."""
    return float(np.bincount(groups, minlength=num_groups).std())

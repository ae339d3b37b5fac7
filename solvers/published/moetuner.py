"""MoETuner: balanced clusters of experts, then clusters to GPUs, by two integer programs.

Problem: first every layer's experts into as many clusters as there are ranks, so that the clusters
carry equal load, then clusters to ranks, so that between two consecutive layers the busiest
link is as little busy as possible. P_le is the load of expert e of layer l, P_l its mean over the
clusters, F_l(c, d) the flow from cluster c of layer l to cluster d of the next.

First program, for each layer:

    minimise   sum_c |T_c - P_l|,   T_c = sum_e P_le x_ec
    (1)  sum_c x_ec = 1                 an expert is in one cluster
    (2)  1 <= sum_e x_ec <= slots       no cluster is empty or larger than a rank
    x_ec binary

Second program:

    minimise   sum_l M_l
    (3)  M_l >= (cost of a message from g to h) sum_d F_l(c, d) y_{l+1}dh
                 - U (1 - y_lcg)        for all c, g != h: what g sends to h if it has cluster c
    (4)  sum_g y_lcg = 1, sum_c y_lcg = 1       one cluster of a layer on each rank
    (5)  least <= sum_lc n_lc y_lcg <= most     ranks hold equally many experts over all layers;
                                                n_lc is the size of the cluster
    y_lcg binary

The cost stands for 1 / bandwidth: `Problem.link_cost`, or 1 within a node and 1 + node_weight
between nodes.

Method: each program begins with a heuristic's answer (greedy packing and exchanges; layer by layer
the labels that let no large flow leave its rank, which without nodes is optimal but for (5), and
exchanges of labels) and improves it or proves it optimal in a fixed amount of work, where it is not
too large. The paper lets Gurobi run until it is within 2.5 % of the optimum, which takes hours for
large models.

What the paper leaves open: with 4 experts and 2 slots to spare (5) can be impossible; least and
most are then what the heuristic reaches. Among labels that are equally good for M_l, the start
prefers those that keep more flow on a rank.

Complexity: L programs of O(E G) variables, one of O(L G^2) variables and O(L G^3) rows; NP-hard.
Guarantee: none on messages; `balanced` in the notes counts the layers whose clusters are optimal.
Redundant slots hold no replicas, but let clusters differ in size.

Source: Go and Mahajan, MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement
and Token Routing, arXiv 2502.06643; it has no published code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.integer_program import BACKENDS, Backend, IntegerProgram, Point, solve
from solvers.packing import pack, place_groups
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution
from solvers.topology import link_costs

CLUSTER_EFFORT = 4.0  # for all layers together
LABEL_EFFORT = 4.0
MAX_CLUSTER_VARIABLES = 4_096
MAX_LABEL_ROWS = 20_000
RESOLUTION = 10_000  # a layer's load, or largest flow, in the units of the programs

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@register(
    "moetuner",
    source="MoETuner (arXiv 2502.06643)",
    needs=("affinity",),
    backends=BACKENDS,
)
def moetuner(problem: Problem, seed: int, budget: Budget, backend: Backend = "cp_sat") -> Solution:
    """Cluster experts for equal load, then clusters to ranks so that no link is busy."""
    assert problem.affinity is not None
    num_layers, num_ranks = problem.num_layers, problem.num_ranks
    clusters = np.empty((num_layers, problem.num_experts), np.int64)
    num_proved = 0
    for layer, load in enumerate(problem.load):
        share = budget.part(0.5 / (num_layers - layer))
        effort = CLUSTER_EFFORT / num_layers
        clusters[layer], proved = balanced_clusters(
            load, num_ranks, problem.slots_per_rank, backend, effort, share
        )
        num_proved += proved
    flow = np.stack(
        [
            _between(layer_flow, clusters[layer], clusters[layer + 1], num_ranks)
            for layer, layer_flow in enumerate(problem.affinity)
        ]
        or [np.zeros((0, num_ranks, num_ranks))]
    ).reshape(-1, num_ranks, num_ranks)
    sizes = np.stack([np.bincount(row, minlength=num_ranks) for row in clusters])
    labels, program = Labelling(flow, link_costs(problem), sizes).solve(backend, budget)
    ranks = np.take_along_axis(labels, clusters, axis=1)
    return Solution(
        place_groups(ranks, num_ranks, problem.slots_per_rank),
        termination=budget.termination(),
        notes={"balanced": num_proved, "label_program": program},
    )


def balanced_clusters(
    load: Floats, num_clusters: int, most: int, backend: Backend, effort: float, budget: Budget
) -> tuple[Labels, bool]:
    """[E] cluster of each expert, by the first program, and whether it was proved optimal.

    Args:
        load: [E].
        most: experts of a cluster.
    """
    clusters = np.empty(load.size, np.int64)
    for cluster, members in enumerate(pack(load, num_clusters, most)):
        clusters[members] = cluster
    units = np.round(load / max(load.sum(), 1e-300) * RESOLUTION).astype(np.int64)
    clusters = _exchange(units, clusters, num_clusters, most)
    excess = int(np.abs(_loads(units, clusters, num_clusters) * num_clusters - units.sum()).sum())
    if excess == 0:
        return clusters, True
    if load.size * num_clusters > MAX_CLUSTER_VARIABLES or budget.expired():
        return clusters, False
    program, x = _cluster_program(units, num_clusters, most)
    start = _cluster_point(program, x, units, clusters)
    answer = solve(program, backend, start, effort, budget)
    return answer.values[x].argmax(axis=1), answer.optimal


def _loads(units: Labels, clusters: Labels, num_clusters: int) -> Labels:
    return np.bincount(clusters, units, minlength=num_clusters).astype(np.int64)


def _exchange(units: Labels, clusters: Labels, num_clusters: int, most: int) -> Labels:
    """Move or exchange experts while that brings two clusters' loads closer to the mean.

    No cluster becomes empty, or larger than `most`; an empty one takes the lightest expert first.
    """
    clusters = clusters.copy()
    num_experts = units.size
    weight = np.append(units, 0)  # the last one stands for nothing: a move
    mean = units.sum() / num_clusters
    for empty in np.nonzero(np.bincount(clusters, minlength=num_clusters) == 0)[0]:
        size = np.bincount(clusters, minlength=num_clusters)
        spare = np.nonzero(size[clusters] > 1)[0]
        if spare.size:
            clusters[spare[units[spare].argmin()]] = empty
    while True:
        size = np.bincount(clusters, minlength=num_clusters)
        away = _loads(units, clusters, num_clusters) - mean
        best: tuple[float, int, int, int] | None = None
        busiest = int(away.argmax())
        mine = np.nonzero(clusters == busiest)[0]
        for other in range(num_clusters):
            if other == busiest:
                continue
            theirs = np.append(np.nonzero(clusters == other)[0], num_experts)
            change = weight[mine][:, None] - weight[theirs][None, :]
            gain = abs(away[busiest]) + abs(away[other])
            gain = gain - np.abs(away[busiest] - change) - np.abs(away[other] + change)
            if size[other] == most or size[busiest] == 1:
                gain[:, -1] = -1
            i, j = np.unravel_index(gain.argmax(), gain.shape)
            if best is None or gain[i, j] > best[0]:
                best = float(gain[i, j]), int(mine[i]), int(theirs[j]), other
        if best is None or best[0] <= 1e-9:
            return clusters
        _, one, two, other = best
        clusters[one] = other
        if two < num_experts:
            clusters[two] = busiest


def _cluster_program(units: Labels, num_clusters: int, most: int) -> tuple[IntegerProgram, Labels]:
    """The first program, times the number of clusters so that the mean is whole; x [E, C]."""
    num_experts, total = units.size, int(units.sum())
    program = IntegerProgram()
    x = np.array(program.binaries(num_experts * num_clusters)).reshape(num_experts, num_clusters)
    away = program.integers(num_clusters, 0, total * num_clusters)
    for row in x.tolist():
        program.total(row, 1)  # (1)
    fewest = int(num_experts >= num_clusters)
    for cluster in range(num_clusters):
        column = x[:, cluster].tolist()
        program.between(fewest, dict.fromkeys(column, 1), most)  # (2)
        load = {v: int(w) * num_clusters for v, w in zip(column, units, strict=True)}
        program.at_most({**load, away[cluster]: -1}, total)  # |T_c - P|, from above
        program.at_most({**{v: -w for v, w in load.items()}, away[cluster]: -1}, -total)
    program.minimise(dict.fromkeys(away, 1))
    return program, x


def _cluster_point(program: IntegerProgram, x: Labels, units: Labels, clusters: Labels) -> Point:
    """The point of the first program that is this clustering."""
    num_clusters = x.shape[1]
    point = np.zeros(program.num_variables, np.int64)
    point[x[np.arange(units.size), clusters]] = 1
    point[x.size :] = np.abs(_loads(units, clusters, num_clusters) * num_clusters - units.sum())
    return point


def _between(flow: Floats, first: Labels, second: Labels, num_clusters: int) -> Floats:
    """[C, C] flow between the clusters of two layers."""
    one = np.eye(num_clusters)
    total: Floats = one[first].T @ flow @ one[second]
    return total


class Labelling:
    """The second program.

    Args:
        flow: [L-1, C, C] between the clusters of consecutive layers.
        cost: [G, G] of a message between ranks.
        sizes: [L, C] experts of each cluster.
    """

    def __init__(self, flow: Floats, cost: Floats, sizes: Labels) -> None:
        self.cost = cost
        self.sizes = sizes
        self.num_layers, self.num_ranks = sizes.shape
        largest = float(flow.max(initial=0.0)) * max(float(cost.max()), 1e-300)
        self.flow = flow / max(largest, 1e-300) * RESOLUTION

    def worst(self, labels: Labels) -> Floats:
        """[L-1] M_l: what the busiest link between two layers costs."""
        worst = np.zeros(self.num_layers - 1)
        for layer, flow in enumerate(self.flow):
            cost = self.cost[np.ix_(labels[layer], labels[layer + 1])]
            worst[layer] = (flow * cost).max()
        return worst

    def solve(self, backend: Backend, budget: Budget) -> tuple[Labels, str]:
        """[L, C] rank of each cluster, and how far the program got."""
        labels = self.level(self.exchange(self.start(), budget))
        if self._all_links_alike():
            labels = np.argsort(labels[0])[labels]
        num_rows = (self.num_layers - 1) * self.num_ranks**3
        if self.num_ranks == 1 or self.num_layers == 1 or not self.flow.any():
            return labels, "nothing to do"
        if num_rows > MAX_LABEL_ROWS or budget.expired():
            return labels, "not run"
        program, y = self.program(labels)
        answer = solve(program, backend, self.point(program, y, labels), LABEL_EFFORT, budget)
        found = answer.values[y].argmax(axis=2)
        if self.worst(found).sum() < self.worst(labels).sum():
            labels = found
        return labels, "optimal" if answer.optimal else "not proved"

    def start(self) -> Labels:
        """Labels layer by layer: the largest flows stay on their rank, one after the other."""
        labels = np.tile(np.arange(self.num_ranks), (self.num_layers, 1))
        for layer, flow in enumerate(self.flow):
            labels[layer + 1] = self.keep_largest(flow, labels[layer])
        return labels

    def keep_largest(self, flow: Floats, labels: Labels) -> Labels:
        """[C] labels of a layer: no flow that can stay leaves, largest first, then most flow stays.

        Args:
            flow: [C, C] from the layer before.
            labels: [C] of the layer before.
        """
        from solvers.assignment import assign

        num_ranks = self.num_ranks
        stays = np.zeros((num_ranks, num_ranks))
        rows, columns = np.zeros(num_ranks, bool), np.zeros(num_ranks, bool)
        for flat in np.argsort(-flow, axis=None, kind="stable"):
            i, j = np.unravel_index(flat, flow.shape)
            if rows[i] or columns[j]:
                break  # this one leaves: the bottleneck; what is smaller is free
            rows[i] = columns[j] = True
            stays[i, j] = 1.0 + flow.sum()
        profit = (flow + stays)[np.argsort(labels)].T  # [cluster, rank]
        matched: Labels = assign(np.ascontiguousarray(profit), np.ones(num_ranks, np.int64))
        return matched

    def exchange(self, labels: Labels, budget: Budget) -> Labels:
        """Exchange two labels, in one layer or in it and all later ones, while that gains."""
        labels = labels.copy()
        worst = self.worst(labels)
        gained = True
        while gained and not budget.expired():
            gained = False
            for layer in range(self.num_layers):
                for one in range(self.num_ranks):
                    for two in range(one + 1, self.num_ranks):
                        for last in (layer + 1, self.num_layers):
                            tried = labels.copy()
                            part = tried[layer:last]
                            tried[layer:last] = np.where(
                                part == one, two, np.where(part == two, one, part)
                            )
                            after = self.worst(tried)
                            if after.sum() < worst.sum() - 1e-9 * RESOLUTION:
                                labels, worst, gained = tried, after, True
        return labels

    def held(self, labels: Labels) -> Labels:
        """[G] experts of each rank over all layers."""
        return np.bincount(labels.ravel(), self.sizes.ravel(), minlength=self.num_ranks).astype(
            np.int64
        )

    def level(self, labels: Labels) -> Labels:
        """Exchange labels within layers until ranks hold equally many experts, or nearly (5)."""
        labels = labels.copy()
        while True:
            held = self.held(labels)
            fullest, emptiest = int(held.argmax()), int(held.argmin())
            if held[fullest] - held[emptiest] <= 1:
                return labels
            best: tuple[float, Labels] | None = None
            for layer in range(self.num_layers):
                mine = int(np.nonzero(labels[layer] == fullest)[0][0])
                theirs = int(np.nonzero(labels[layer] == emptiest)[0][0])
                moved = self.sizes[layer, mine] - self.sizes[layer, theirs]
                if not 0 < moved < held[fullest] - held[emptiest]:
                    continue
                tried = labels.copy()
                tried[layer, mine], tried[layer, theirs] = emptiest, fullest
                worth = float(self.worst(tried).sum())
                if best is None or worth < best[0]:
                    best = worth, tried
            if best is None:
                return labels
            labels = best[1]

    def program(self, labels: Labels) -> tuple[IntegerProgram, Labels]:
        """The second program, no looser in (5) than `labels`; y [L, C, G]."""
        num_layers, num_ranks = self.num_layers, self.num_ranks
        units = self.units()
        program = IntegerProgram()
        shape = (num_layers, num_ranks, num_ranks)
        y = np.array(program.binaries(int(np.prod(shape)))).reshape(shape)
        most = program.integers(num_layers - 1, 0, int(units.max()))
        for layer, row in np.ndindex(num_layers, num_ranks):
            program.total(y[layer, row].tolist(), 1)  # (4)
            program.total(y[layer, :, row].tolist(), 1)
        for layer, c, g, h in np.ndindex(num_layers - 1, num_ranks, num_ranks, num_ranks):
            if g == h:
                continue
            sent = units[layer, c, :, g, h]
            bound = int(sent.max())
            if bound == 0:
                continue
            row = {int(y[layer + 1, d, h]): int(sent[d]) for d in np.nonzero(sent)[0]}
            program.at_most({**row, int(y[layer, c, g]): bound, most[layer]: -1}, bound)  # (3)
        held = self.held(labels)
        even = self.sizes.sum() / num_ranks
        least = min(int(held.min()), int(np.floor(even)))
        fullest = max(int(held.max()), int(np.ceil(even)))
        for g in range(num_ranks):
            row = {
                int(y[layer, c, g]): int(self.sizes[layer, c])
                for layer, c in np.ndindex(num_layers, num_ranks)
            }
            program.between(least, row, fullest)  # (5)
        if self._all_links_alike():  # then ranks are named by the first layer's clusters
            for c in range(num_ranks):
                program.total([int(y[0, c, c])], 1)
        program.minimise(dict.fromkeys(most, 1))
        return program, y

    def units(self) -> Labels:
        """[L-1, C, D, G, H] cost of the flow from cluster c to d, if they are on g and h."""
        cost = self.flow[:, :, :, None, None] * self.cost
        return np.ceil(cost).astype(np.int64)

    def point(self, program: IntegerProgram, y: Labels, labels: Labels) -> Point:
        """The point of the program that is these labels."""
        point = np.zeros(program.num_variables, np.int64)
        layer, cluster = np.indices(labels.shape)
        point[y[layer, cluster, labels]] = 1
        sent = self.units()
        for first in range(self.num_layers - 1):
            here, there = labels[first][:, None], labels[first + 1][None, :]
            c, d = np.indices((self.num_ranks, self.num_ranks))
            point[y.size + first] = sent[first, c, d, here, there].max()
        return point

    def _all_links_alike(self) -> bool:
        away = self.cost[~np.eye(self.num_ranks, dtype=bool)]
        return bool(
            away.size and (away == away[0]).all() and (self.sizes == self.sizes[0, 0]).all()
        )

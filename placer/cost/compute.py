"""Time of the experts' computation: a measured curve or a roofline, and hosts that share cores.

Formulas in docs/cost-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster
from placer.trace.model import ModelDims

Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Computed:
    """Computation of n batches in L layers.

    Attributes:
        time_us: [n, L] when the last rank is done.
        balanced_us: [n, L] the same if every rank had the mean of the ranks' work.
        rank: [n, L] the rank with the most work.
    """

    time_us: Times
    balanced_us: Times
    rank: NDArray[np.intp]


def compute_time(
    cluster: Cluster,
    dims: ModelDims,
    pairs: NDArray[np.int32],
    activated: NDArray[np.int32],
    curve_us: Times,
) -> Computed:
    """Time of pairs [n, L, G] on activated [n, L, G] distinct experts.

    Work of a rank = fixed cost + the measured times of its experts, `curve_us` [n, L, G]; where
    that is empty, fixed cost + cost per expert used + roofline: the larger of FLOPs / peak and
    bytes of the experts used / memory bandwidth, and what of the smaller does not overlap. Where
    more ranks of a node work than can do so at full speed, the node needs the sum of their work /
    ranks at full speed.
    """
    work = curve_us.copy() if curve_us.size else _roofline(cluster, dims, pairs, activated)
    if cluster.compute_latency_us:
        work += (pairs > 0) * cluster.compute_latency_us
    time = work.max(axis=2)
    balanced = work.mean(axis=2)
    speed = cluster.ranks_at_full_speed
    if speed is not None:
        of_nodes = work.reshape(*work.shape[:2], cluster.num_nodes, -1).sum(axis=3) / speed
        time = np.maximum(time, of_nodes.max(axis=2))
        balanced = np.maximum(balanced, of_nodes.mean(axis=2))
    return Computed(time, balanced, work.argmax(axis=2))


def curve_increments(cluster: Cluster, dims: ModelDims) -> Times:
    """[M] what the first, second, ... pair of an expert adds to its time, linear between points.

    Empty where the cluster has no curve, or one of other experts than the model's.
    """
    if not cluster.curve_pairs or cluster.curve_expert_bytes != dims.expert_bytes:
        return np.zeros(0)
    most = cluster.curve_pairs[-1]
    points = np.arange(most + 1)
    times = np.interp(points, (0, *cluster.curve_pairs), (0.0, *cluster.curve_us))
    increments: Times = np.diff(times)
    return increments


def _roofline(
    cluster: Cluster, dims: ModelDims, pairs: NDArray[np.int32], activated: NDArray[np.int32]
) -> Times:
    flops, hbm = cluster.of_ranks("flops"), cluster.of_ranks("hbm_gbps")
    assert flops is not None
    assert hbm is not None
    flop_us = float(dims.expert_flops_per_token or 0) / flops * 1e6  # [G]
    read_us = float(dims.expert_bytes or 0) / (hbm * 1e3)
    calculating, reading = pairs * flop_us, activated * read_us
    work: Times = np.maximum(calculating, reading)
    if cluster.compute_overlap < 1:
        work += (1 - cluster.compute_overlap) * np.minimum(calculating, reading)
    if cluster.expert_latency_us:
        work += activated * cluster.expert_latency_us
    return work

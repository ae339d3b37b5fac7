"""From a calibration's times to a `Cluster`: the cost model's own parameters, fitted.

The fit minimises relative errors of the very formulas that later predict (`placer.cost.links`,
`placer.cost.compute`), so that what it says of its errors is what predictions start from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster, NetworkScope
from placer.cost.compute import compute_time
from placer.cost.links import Links
from placer.runtime.calibrate_probes import (
    Computation,
    Exchange,
    Layer,
    routing_of,
    targets_of,
)
from placer.runtime.context import RankContext
from placer.trace.model import ModelDims

Floats = NDArray[np.float64]
_LEAST_WORK = 0.01  # of a layer's time, where disturbed transfers explain all of it
_CLEAR = 0.5  # most of a layer's time that transfers take where the rest of it can be told
_CONTENDED = 0.75  # above, ranks have cores of their own and merely contend for memory


@dataclass(frozen=True, eq=False)
class Fitted:
    """Parameters and how well they meet the measurements.

    Attributes:
        figures: attribute of `Cluster` -> value.
        predicted_us, measured_us: [probes].
    """

    figures: dict[str, float]
    predicted_us: Floats
    measured_us: Floats

    @property
    def errors(self) -> Floats:
        """[probes] |predicted / measured - 1|."""
        return np.abs(self.predicted_us / self.measured_us - 1)


def _add_states(
    table: NDArray[np.int32], home: int, ranks: NDArray[np.int64], per_node: int
) -> None:
    """Add what one token sends to [link, direction, G]."""
    for rank in ranks:
        if rank == home:
            table[3, :, home] += 1
        else:
            link = 0 if rank // per_node == home // per_node else 1
            table[link, 0, home] += 1
            table[link, 1, rank] += 1


def states_of(exchanges: Sequence[Exchange], context: RankContext) -> NDArray[np.int32]:
    """[X, 1, link, direction, G] hidden states of a dispatch; see `transfer_kernels.transfers`."""
    num_ranks, per_node = context.num_ranks, context.ranks_per_node
    states = np.zeros((len(exchanges), 1, 4, 2, num_ranks), np.int32)
    for table, probe in zip(states[:, 0], exchanges, strict=True):
        for source, targets in enumerate(targets_of(probe, context)):
            for target in targets:
                _add_states(table, source, np.array([target]), per_node)
    return states


def fit_links(
    cluster: Cluster,
    exchanges: Sequence[Exchange],
    exchange_us: Floats,
    state_bytes: int,
    context: RankContext,
) -> Fitted:
    """Latency and bandwidth of every class of links, so that exchanges take what they took.

    A dispatch and its combine take the same, half of what was measured.

    Args:
        cluster: with the number of ranks and nodes; its links' figures are where the fit begins.
        exchanges: [X].
        exchange_us: [X] dispatch + combine.
        state_bytes: of a hidden state.
        context: of any rank.
    """
    states = states_of(exchanges, context)
    names = ["same_rank_gbps"]
    if cluster.ranks_per_node > 1:
        names += ["intra_node_latency_us", "intra_node_gbps", "intra_node_shared_gbps"]
    if cluster.num_nodes > 1:
        names += ["inter_node_latency_us", "inter_node_gbps"]

    def predicted(figures: dict[str, float]) -> Floats:
        links = Links(replace(cluster, **cast(Any, figures)))
        wire: Floats = links.transfer(states, None, state_bytes).wire_us[:, 0]
        return 2 * (wire + links.latency_us(in_turn=False))

    begin = {name: getattr(cluster, name) or 4 * cluster.intra_node_gbps for name in names}
    return _fitted(predicted, begin, exchange_us)


def fit_scope(
    cluster: Cluster,
    exchanges: Sequence[Exchange],
    exchange_us: Floats,
    state_bytes: int,
    context: RankContext,
) -> tuple[NetworkScope, Fitted]:
    """Whether ranks have network links of their own or share their node's, and `fit_links`.

    Told by which of the two explains better what one rank alone can send across.
    """
    scopes: tuple[NetworkScope, ...] = ("rank",)
    if cluster.num_nodes > 1 and cluster.ranks_per_node > 1:
        scopes = ("rank", "node")
    fits = {
        scope: fit_links(
            replace(cluster, inter_node_scope=scope), exchanges, exchange_us, state_bytes, context
        )
        for scope in scopes
    }
    best = min(scopes, key=lambda scope: float(fits[scope].errors.mean()))
    return best, fits[best]


def speed_of(
    computations: Sequence[Computation], compute_us: Floats, ranks_per_node: int
) -> float | None:
    """How many ranks of a node compute at full speed at once; None where all of them do.

    Told by how much longer a computation takes when all ranks do it at once.

    Args:
        computations: [C], some alone and the same on all ranks.
        compute_us: [C] of the slowest node.
        ranks_per_node: most that it can be.
    """
    times = dict(zip(computations, compute_us.tolist(), strict=True))
    ratios = [
        times[replace(probe, alone=False)] / time for probe, time in times.items() if probe.alone
    ]
    speed = ranks_per_node / max(1.0, float(np.median(ratios)))
    return speed if speed < _CONTENDED * ranks_per_node else None


def work_of_layers(
    cluster: Cluster,
    layers: Sequence[Layer],
    layer_us: Floats,
    compute_us: Floats,
    num_experts: int,
    top_k: int,
    state_bytes: int,
) -> tuple[NDArray[np.int64], Floats]:
    """Pairs of each expert, and work of each rank: what transfers do not explain of a layer.

    Where transfers take most of it, as over a slow network, what remains would be their errors:
    there it is what ranks took for their experts by their own clocks.

    Args:
        cluster: with fitted links.
        layers: [P].
        layer_us: [P] dispatch + compute + combine.
        compute_us: [P] compute alone, mean over ranks.
        num_experts: E, as many on every rank.
        top_k: experts of a token.
        state_bytes: of a hidden state.
    """
    num_ranks = cluster.num_ranks
    slots = num_experts // num_ranks
    links = Links(cluster)
    work = np.empty(len(layers))
    pairs = np.empty(len(layers), np.int64)
    for i, layer in enumerate(layers):
        ranks = routing_of(layer, num_experts, top_k, num_ranks) // slots
        states = np.zeros((1, 1, 4, 2, num_ranks), np.int32)
        for home in range(num_ranks):
            for token in ranks[home]:
                _add_states(states[0, 0], home, np.unique(token), cluster.ranks_per_node)
        wire = float(links.transfer(states, None, state_bytes).wire_us[0, 0])
        transfers = 2 * (wire + links.latency_us(in_turn=False))
        speed = cluster.ranks_at_full_speed
        share = 1.0 if speed is None else min(1.0, speed / cluster.ranks_per_node)
        is_clear = transfers <= _CLEAR * layer_us[i]
        own = layer_us[i] - transfers if is_clear else compute_us[i]
        work[i] = max(_LEAST_WORK * layer_us[i] if is_clear else 0.0, own) * share
        pairs[i] = ranks.size // num_experts
    return pairs, work


def fit_roofline(
    cluster: Cluster, dims: ModelDims, slots: int, pairs: NDArray[np.int64], work_us: Floats
) -> Fitted:
    """The roofline of ranks that use `slots` experts with `pairs` [P] each, for other experts."""
    used = np.full((len(pairs), 1, 1), slots, np.int32)
    served = (used * pairs[:, None, None]).astype(np.int32)
    one = replace(cluster, num_nodes=1, ranks_per_node=1, ranks_at_full_speed=None)
    begin = {
        "flops": cluster.flops or 1e11,
        "hbm_gbps": cluster.hbm_gbps or 10.0,
        "expert_latency_us": 5.0,
        "compute_overlap": 0.5,
    }

    def predicted(figures: dict[str, float]) -> Floats:
        found = compute_time(
            replace(one, **cast(Any, figures)), dims, served, used, np.zeros((0, 1, 1))
        )
        times: Floats = found.time_us[:, 0]
        return times

    return _fitted(predicted, begin, work_us, {"compute_overlap": 1.0})


def fixed_cost(computations: Sequence[Computation], compute_us: Floats) -> float:
    """What a layer of one expert with one pair takes beyond a further such expert."""
    times = {
        probe.experts: time
        for probe, time in zip(computations, compute_us.tolist(), strict=True)
        if probe.pairs == 1 and probe.alone
    }
    several = max(times)
    if several == 1:
        return 0.0
    return float(max(0.0, times[1] - (times[several] - times[1]) / (several - 1)))


def curve_points(
    slots: int, pairs: NDArray[np.int64], work_us: Floats, fixed_us: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Numbers of pairs, and the time of one expert with as many; not decreasing."""
    each = np.maximum(_LEAST_WORK * work_us, work_us - fixed_us) / slots
    return tuple(pairs.tolist()), tuple(np.maximum.accumulate(each).tolist())


def _fitted(
    predicted: Callable[[dict[str, float]], Floats],
    begin: dict[str, Any],
    measured_us: Floats,
    bounds: dict[str, float] | None = None,
) -> Fitted:
    """Least squares of log(predicted / measured), robust, over logarithms of the parameters.

    Args:
        predicted: figures -> [probes].
        begin: figures to begin with, all positive.
        measured_us: [probes].
        bounds: name -> the most that a figure may be.
    """
    from scipy.optimize import least_squares

    names = list(begin)
    most = np.array([np.log((bounds or {}).get(name, 1e30)) for name in names])

    def figures_of(x: Floats) -> dict[str, float]:
        return {name: float(value) for name, value in zip(names, np.exp(x), strict=True)}

    def residuals(x: Floats) -> Floats:
        misses: Floats = np.log(predicted(figures_of(x)) / measured_us)
        return misses

    best = None
    for scale in (1.0, 0.3, 3.0):  # the largest of several links has flat directions
        start = np.minimum(np.log([begin[name] * scale for name in names]), most - 1e-3)
        found = least_squares(
            residuals, start, bounds=(np.full(len(names), -30.0), most), loss="soft_l1",
            f_scale=0.05, x_scale=1.0, diff_step=[1e-4],
        )  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    figures = figures_of(best.x)
    return Fitted(figures, predicted(figures), measured_us)

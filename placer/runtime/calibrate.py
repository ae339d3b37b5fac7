"""`placer calibrate`: measure a process group and a model's experts, write a `Cluster`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from placer.cluster import Cluster
from placer.errors import UsageError
from placer.runtime.calibrate_fit import (
    Fitted,
    curve_points,
    fit_roofline,
    fit_scope,
    fixed_cost,
    speed_of,
    work_of_layers,
)
from placer.runtime.calibrate_probes import (
    Computation,
    Exchange,
    Layer,
    Measured,
    Pattern,
    Program,
    measure,
)
from placer.runtime.context import RankContext, context_from_environment, is_launched
from placer.runtime.launch import launch
from placer.trace.model import ModelDims
from placer.wording import counted

_SIZES = (1, 4, 16, 64, 256, 512)
_MOST_BYTES = 2**23  # of one rank's states in one exchange
_PAIRS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MOST_PAIRS = 16384


@dataclass(frozen=True, eq=False)
class Calibration:
    """A measured cluster.

    Attributes:
        cluster: ready to be written and used.
        links, roofline: the fits; no roofline without a model.
        measured: what they were made from.
        program: what was measured.
    """

    cluster: Cluster
    links: Fitted
    roofline: Fitted | None
    measured: Measured
    program: Program

    def summary(self) -> dict[str, Any]:
        """Errors of the fits, as JSON and as the file's table [fit]."""
        found: dict[str, Any] = {
            "measured": True,
            "backend": self.measured.backend,
            "num_probes": len(self.links.errors)
            + len(self.program.layers)
            + len(self.program.computations),
            "repeats": self.program.repeats,
            "spread": round(self.measured.spread, 4),
        }
        for name, fit in (("transfer", self.links), ("roofline", self.roofline)):
            if fit is not None:
                found[f"{name}_error_median"] = round(float(np.median(fit.errors)), 4)
                found[f"{name}_error_p90"] = round(float(np.quantile(fit.errors, 0.9)), 4)
        return found


def calibrate(
    folder: Path | None,
    num_ranks: int,
    num_nodes: int = 1,
    *,
    name: str = "calibrated",
    dtype: str = "auto",
    hidden_size: int = 2048,
    with_pairs: bool = False,
    repeats: int = 15,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration | None:
    """Measure the links between ranks and, with a model, its experts' computation.

    Local processes are started, unless this process is one rank of a running launch (torchrun).

    Args:
        folder: of a checkpoint: its hidden states and experts are what is measured.
        num_ranks, num_nodes: of the group; ranks of a node have consecutive numbers.
        name: of the cluster.
        dtype: of weights and states, see `read_layout`.
        hidden_size: of states, without a model.
        with_pairs: also the full table of what each rank can send to each other.
        repeats: of every probe.
        progress: told what is being done.

    Returns:
        The calibration; None on the ranks of a launch other than rank 0.
    """
    if num_ranks < 2:
        raise UsageError("there are no links to measure between fewer than 2 ranks", "--gpus 2")
    if num_ranks % num_nodes:
        raise UsageError(
            f"{num_nodes} nodes do not divide {num_ranks} ranks", "give --nodes that divide --gpus"
        )
    if repeats < 3:
        raise UsageError(f"repeats is {repeats}, expected at least 3")
    per_node = num_ranks // num_nodes
    shape = _Shape(ModelDims(hidden_size=hidden_size), 0, 1, 4)
    if folder is not None:
        progress("reading the model's configuration")
        shape = _shape_of(folder, dtype)
    dims = shape.dims
    program = program_for(
        folder,
        num_ranks,
        num_nodes,
        dtype=dtype,
        hidden_size=int(dims.hidden_size or hidden_size),
        element_bytes=shape.element_bytes,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        with_pairs=with_pairs,
        repeats=repeats,
    )
    progress("measuring")
    if is_launched():
        context = context_from_environment(per_node)
        if context.num_ranks != num_ranks:
            raise UsageError(f"{context.num_ranks} ranks were launched, {num_ranks} are asked for")
        measured = measure(context, program)
        if context.rank:
            return None
    else:
        measured = launch(measure, num_ranks, (program,), ranks_per_node=per_node)[0]
        context = RankContext(0, num_ranks, per_node, 0, "", 0, serves_store=False)
    progress("fitting")
    return assembled(program, measured, dims, context, name)


def program_for(
    folder: Path | None,
    num_ranks: int,
    num_nodes: int,
    *,
    dtype: str,
    hidden_size: int,
    element_bytes: int,
    num_experts: int,
    top_k: int,
    with_pairs: bool,
    repeats: int,
) -> Program:
    """Probes that tell the parameters of the cost model apart."""
    most = max(1, _MOST_BYTES // (hidden_size * element_bytes))
    sizes = sorted({min(size, most) for size in _SIZES})
    patterns: list[Pattern] = ["stay", "all"]
    if num_ranks > num_nodes:
        patterns += ["next", "one"]
    if num_nodes > 1:
        patterns += ["across"]
    if num_ranks > num_nodes > 1:
        patterns += ["first"]
    slots = -(-num_experts // num_ranks)
    return Program(
        folder=folder,
        dtype=dtype,
        hidden_size=hidden_size,
        top_k=top_k,
        exchanges=tuple(Exchange(pattern, size) for size in sizes for pattern in patterns),
        computations=_computations(slots) if slots else (),
        layers=_layers(slots * num_ranks, top_k, num_ranks) if slots else (),
        with_pairs=with_pairs,
        repeats=repeats,
    )


def _computations(slots: int) -> tuple[Computation, ...]:
    """A single expert, and full ones, alone and on all ranks at once."""
    full = [Computation(slots, pairs, alone) for pairs in (1, 16) for alone in (False, True)]
    single = [Computation(1, 1, alone) for alone in (False, True)] if slots > 1 else []
    return (*single, *full)


def _layers(num_experts: int, top_k: int, num_ranks: int) -> tuple[Layer, ...]:
    """Layers in which every expert has a whole number of pairs, 1, 2, 4, ... where that goes."""
    whole = num_experts // gcd(num_experts, top_k * num_ranks)  # tokens of a rank
    pairs_of_whole = whole * top_k * num_ranks // num_experts
    sizes = sorted({-(-pairs // pairs_of_whole) * whole for pairs in _PAIRS})
    return tuple(
        Layer(tokens)
        for i, tokens in enumerate(sizes)
        if i == 0 or tokens * top_k * num_ranks <= _MOST_PAIRS
    )


def assembled(
    program: Program, measured: Measured, dims: ModelDims, context: RankContext, name: str
) -> Calibration:
    """Fit, and put the cluster together."""
    num_nodes = context.num_ranks // context.ranks_per_node
    cluster = Cluster(
        name=name,
        num_nodes=num_nodes,
        ranks_per_node=context.ranks_per_node,
        intra_node_gbps=1.0,
        intra_node_latency_us=float(measured.exchange_us.min()) / 2,
        inter_node_gbps=1.0,
        inter_node_latency_us=float(measured.exchange_us.min()) / 2,
        memory_bytes=_memory_bytes(),
    )
    scope, links = fit_scope(
        cluster, program.exchanges, measured.exchange_us, measured.state_bytes, context
    )
    cluster = replace(cluster, inter_node_scope=scope, **_rounded(links.figures))
    roofline = None
    if program.layers:
        speed = speed_of(program.computations, measured.compute_us, context.ranks_per_node)
        cluster = replace(cluster, ranks_at_full_speed=speed and float(f"{speed:.4g}"))
        slots = max(probe.experts for probe in program.computations)
        pairs, work = work_of_layers(
            cluster,
            program.layers,
            measured.layer_us,
            measured.layer_compute_us,
            slots * context.num_ranks,
            program.top_k,
            measured.state_bytes,
        )
        fixed = fixed_cost(program.computations, measured.compute_us)
        cluster = replace(cluster, compute_latency_us=float(f"{fixed:.4g}"))
        roofline = fit_roofline(cluster, dims, slots, pairs, work)
        points, times = curve_points(slots, pairs, work, fixed)
        cluster = replace(
            cluster,
            **_rounded(roofline.figures),
            curve_pairs=points,
            curve_us=tuple(float(f"{value:.4g}") for value in times),
            curve_expert_bytes=dims.expert_bytes,
        )
    if measured.pair_us is not None:
        cluster = replace(cluster, **pair_tables(measured, cluster))
    if num_nodes == 1:  # nothing goes between nodes; what is written there is not measured
        cluster = replace(
            cluster,
            inter_node_gbps=cluster.intra_node_gbps,
            inter_node_latency_us=cluster.intra_node_latency_us,
        )
    states = f"{measured.state_bytes:,}-byte states"
    what = states if program.folder is None else f"experts and {states} of {program.folder.name}"
    elsewhere = "" if num_nodes > 1 else "; between nodes nothing was measured: as inside the node"
    source = (
        f"measured: placer calibrate, {measured.backend}, "
        f"{counted(context.num_ranks, 'rank')} on {counted(num_nodes, 'node')}, "
        f"{counted(os.cpu_count() or 1, 'core')} here; {what}; latencies are those of "
        f"collectives among {context.num_ranks} ranks{elsewhere}"
    )
    return Calibration(replace(cluster, source=source), links, roofline, measured, program)


def pair_tables(measured: Measured, cluster: Cluster) -> dict[str, Any]:
    """Latency and bandwidth of every ordered pair: alpha-beta through the measured sizes.

    What a collective among all ranks takes longer than the slowest pair goes to `peer_latency_us`.
    """
    assert measured.pair_us is not None
    sizes = np.array(measured.pair_bytes, np.float64)
    times = measured.pair_us
    latency = times[0]
    slope = (times[-1] - times[0]) / (sizes[-1] - sizes[0])  # us a byte
    num_ranks = cluster.num_ranks
    gbps = 1e-3 / np.maximum(slope, 1e-9)
    np.fill_diagonal(gbps, 0.0)
    np.fill_diagonal(latency, 0.0)
    whole = max(
        cluster.intra_node_latency_us if cluster.ranks_per_node > 1 else 0.0,
        cluster.inter_node_latency_us if cluster.num_nodes > 1 else 0.0,
    )
    rest = max(0.0, whole - float(latency.max()))
    return {
        "pair_gbps": tuple(tuple(float(f"{v:.4g}") for v in row) for row in gbps),
        "pair_latency_us": tuple(tuple(float(f"{v:.4g}") for v in row) for row in latency),
        "peer_latency_us": float(f"{rest / (num_ranks - 1):.4g}"),
    }


@dataclass(frozen=True)
class _Shape:
    """What of a model is measured."""

    dims: ModelDims
    num_experts: int
    top_k: int
    element_bytes: int


def _shape_of(folder: Path, dtype: str) -> _Shape:
    from placer.models.config import top_k_of
    from placer.runtime.layout import read_layout

    layout = read_layout(folder, dtype)
    matrices = sum(
        int(np.prod(shape)) for shape in layout.expert_parameters.values() if len(shape) >= 2
    )
    dims = ModelDims(folder.name, layout.hidden_size, layout.expert_bytes, 2.0 * matrices)
    top_k = top_k_of(layout.model.config.get_text_config())
    return _Shape(dims, layout.num_experts, top_k, layout.dtype.itemsize)


def _rounded(figures: dict[str, float]) -> dict[str, Any]:
    """Four significant digits; more would be noise, and next to nothing is nothing."""
    return {name: float(f"{value:.4g}") if value > 1e-6 else 0.0 for name, value in figures.items()}


def _memory_bytes() -> int | None:
    """Of this rank's GPU; a host's memory is shared by its ranks and not a rank's own."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)

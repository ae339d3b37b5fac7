"""What every rank does in a calibration: exchanges and layers of known size, timed.

Everything goes through the same `alltoall` and `Bank` that serve a model: exchanges with experts
that take no time, layers with experts of the model's shape and random weights. Probes are
interleaved in a new order each time, so that a disturbance meets every probe alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from placer.placement import Placement, contiguous
from placer.runtime.bank import Bank
from placer.runtime.context import RankContext
from placer.runtime.counters import PARTS, Counters
from placer.runtime.dispatch.alltoall import alltoall
from placer.runtime.dispatch.common import Group
from placer.runtime.layout import ModelLayout, read_layout
from placer.runtime.meeting import joined
from placer.runtime.rank import device_of
from placer.runtime.rows import Tokens
from placer.runtime.transport import Transport

Pattern = Literal["stay", "next", "across", "first", "one", "all"]
_ROUNDS = 4  # layers in a row: what follows a barrier is out of step for a while
_MOST_BYTES = 2**30  # of the experts' weights that a rank holds
_PAIR_BYTES = (1, 2**18, 2**20)


@dataclass(frozen=True)
class Exchange:
    """One dispatch and combine; every token has one expert.

    Attributes:
        pattern: `stay` on its rank, `next` rank of the node, `across` to the next node, `first`:
            likewise, but only the first rank of each node sends, `one`: only rank 0 sends, `all`:
            spread over all ranks.
        tokens: of each rank that sends.
    """

    pattern: Pattern
    tokens: int


@dataclass(frozen=True)
class Computation:
    """Experts of one layer on one rank.

    Attributes:
        experts: that are used.
        pairs: of each of them.
        alone: whether the other ranks rest meanwhile.
    """

    experts: int
    pairs: int
    alone: bool


@dataclass(frozen=True)
class Layer:
    """A whole MoE layer, every expert with as many pairs as every other.

    Attributes:
        tokens: of each rank.
    """

    tokens: int


@dataclass(frozen=True)
class Program:
    """What a calibration measures.

    Attributes:
        folder: of the model whose experts are run; None for exchanges only.
        dtype: of its weights, see `read_layout`.
        hidden_size: of exchanged states, where there is no model.
        top_k: experts of a token in layers.
        exchanges, computations, layers: the probes.
        with_pairs: exchange between every two ranks alone as well.
        repeats: of every probe.
    """

    folder: Path | None
    dtype: str
    hidden_size: int
    top_k: int
    exchanges: tuple[Exchange, ...]
    computations: tuple[Computation, ...]
    layers: tuple[Layer, ...]
    with_pairs: bool
    repeats: int


@dataclass(frozen=True, eq=False)
class Measured:
    """Times in microseconds, medians over repeats; the same on every rank.

    Attributes:
        exchange_us: [X] dispatch + combine, mean over ranks.
        compute_us: [C] of the slowest node.
        layer_us: [layers] dispatch + compute + combine, mean over ranks.
        layer_compute_us: [layers] their compute alone, mean over ranks.
        pair_us: [sizes, G, G] from rank to rank, one way; None when not asked.
        pair_bytes: of the sizes.
        state_bytes: of a hidden state.
        spread: median over probes of (upper - lower quartile) / median.
        backend: of torch.distributed.
    """

    exchange_us: NDArray[np.float64]
    compute_us: NDArray[np.float64]
    layer_us: NDArray[np.float64]
    layer_compute_us: NDArray[np.float64]
    pair_us: NDArray[np.float64] | None
    pair_bytes: tuple[int, ...]
    state_bytes: int
    spread: float
    backend: str


def measure(context: RankContext, program: Program) -> Measured:
    """Run the program on this rank, together with the others."""
    device = device_of(context)
    layout = None if program.folder is None else read_layout(program.folder, program.dtype)
    with joined(context, device) as transport, torch.inference_mode():
        lab = _Laboratory(transport, layout, program.hidden_size, program.top_k)
        exchanges = [lab.exchange(probe) for probe in program.exchanges]
        computations = [lab.computation(probe) for probe in program.computations]
        layers = [lab.layer(probe) for probe in program.layers]
        runs = (*exchanges, *layers, *computations)
        found = np.zeros((program.repeats, len(runs), 2))
        for run in runs:
            run()  # warm
        for repeat, row in enumerate(found):
            for i in np.random.default_rng(repeat).permutation(len(runs)):  # the same on all ranks
                row[i] = runs[i]()
        pairs = lab.pairs(program.repeats) if program.with_pairs else None
        gathered = [np.empty(0)] * context.num_ranks
        dist.all_gather_object(gathered, found)
        backend = dist.get_backend()
    times = np.stack(gathered) * 1e6  # [G, repeats, probes, 2]
    num_whole = len(exchanges) + len(layers)  # of which ranks wait for each other
    by_probe = np.concatenate(
        [
            times[:, :, :num_whole, 0].mean(axis=0),
            span_of_nodes(times[:, :, num_whole:], context.ranks_per_node),
        ],
        axis=1,
    )
    low, middle, high = np.quantile(by_probe, [0.25, 0.5, 0.75], axis=0)
    exchange_us, layer_us, compute_us = np.split(middle, [len(exchanges), num_whole])
    return Measured(
        exchange_us=exchange_us,
        compute_us=compute_us,
        layer_us=layer_us,
        layer_compute_us=np.median(times[:, :, len(exchanges) : num_whole, 1].mean(axis=0), axis=0),
        pair_us=pairs,
        pair_bytes=_PAIR_BYTES,
        state_bytes=lab.state_bytes,
        spread=float(np.median((high - low) / middle)),
        backend=backend,
    )


def span_of_nodes(times: NDArray[np.float64], ranks_per_node: int) -> NDArray[np.float64]:
    """[...] from the first begin to the last end on a node, of the slowest node.

    Args:
        times: [G, ..., 2] begin and end of each rank by its host's clock, NaN of those at rest.
        ranks_per_node: ranks with one clock.
    """
    of_nodes = times.reshape(len(times) // ranks_per_node, ranks_per_node, *times.shape[1:])
    busy = ~np.isnan(of_nodes[..., 0]).all(axis=1)
    begins = np.where(np.isnan(of_nodes[..., 0]), np.inf, of_nodes[..., 0]).min(axis=1)
    ends = np.where(np.isnan(of_nodes[..., 1]), -np.inf, of_nodes[..., 1]).max(axis=1)
    spans: NDArray[np.float64] = np.where(busy, ends - begins, 0.0).max(axis=0)
    return spans


class _Idle:
    """Experts that take no time."""

    def partial_sums(self, tokens: Tokens, counters: Counters) -> Tensor:
        return tokens.hidden


class _Laboratory:
    """Builds probes: functions that run once and give two numbers, in seconds per layer.

    Of an exchange or layer, how long it took, and its computation; of a computation, when it began
    and ended.
    """

    def __init__(
        self, transport: Transport, layout: ModelLayout | None, hidden_size: int, top_k: int
    ) -> None:
        self._transport = transport
        self._layout = layout
        self._size = hidden_size if layout is None else layout.hidden_size
        self._dtype = torch.float32 if layout is None else layout.dtype
        self.state_bytes = self._size * self._dtype.itemsize
        num_ranks = transport.num_ranks
        per_node = transport.context.ranks_per_node
        self._counters = Counters(1, transport.device.type)
        # one expert per rank: what is exchanged depends on ranks alone
        placement = contiguous(1, num_ranks, num_ranks, 1, per_node)
        idle: Any = _Idle()
        self._group = Group(placement, transport, self._counters, [idle])
        self._top_k = top_k
        if layout is not None:
            slots = self._slots_per_rank(layout)
            experts = slots * num_ranks
            placement = contiguous(1, experts, num_ranks, slots, per_node)
            self._banks = self._random_banks(layout, placement)
            self._layers = Group(placement, transport, self._counters, self._banks)

    def layer(self, probe: Layer) -> Callable[[], tuple[float, float]]:
        num_ranks, own = self._transport.num_ranks, self._transport.rank
        experts = self._layers.placement.num_experts
        chosen = routing_of(probe, experts, self._top_k, num_ranks)[own]
        device = self._transport.device
        tokens = Tokens(
            self._states(probe.tokens),
            torch.from_numpy(chosen.astype(np.int32)).to(device),
            torch.full(chosen.shape, 1 / self._top_k, device=device),
        )

        def run() -> tuple[float, float]:
            self._layers.tokens_of_rank = [probe.tokens] * num_ranks
            self._counters.reset()
            dist.barrier()
            for _ in range(-(-_ROUNDS // len(self._banks))):
                for bank in self._banks:
                    self._layers.banks = [bank]
                    alltoall(self._layers, 0, tokens)
            rounds = -(-_ROUNDS // len(self._banks)) * len(self._banks)
            seconds = self._counters.seconds.sum(axis=(0, 1)) / rounds
            return float(seconds.sum()), float(seconds[PARTS.index("compute")])

        return run

    def exchange(self, probe: Exchange) -> Callable[[], tuple[float, float]]:
        targets = targets_of(probe, self._transport.context)[self._transport.rank]
        device = self._transport.device
        tokens = Tokens(
            self._states(targets.size),
            torch.from_numpy(targets.astype(np.int32))[:, None].to(device),
            torch.ones((targets.size, 1), device=device),
        )

        def run() -> tuple[float, float]:
            self._group.tokens_of_rank = [probe.tokens] * self._transport.num_ranks
            self._counters.reset()
            dist.barrier()
            for _ in range(_ROUNDS):
                alltoall(self._group, 0, tokens)
            seconds = self._counters.seconds.sum(axis=(0, 1)) / _ROUNDS
            return float(seconds.sum()), float(seconds[PARTS.index("compute")])

        return run

    def computation(self, probe: Computation) -> Callable[[], tuple[float, float]]:
        rests = probe.alone and self._transport.rank != 0
        layout, own = self._layout, self._transport.rank
        assert layout is not None
        slots = np.arange(probe.experts * probe.pairs) % probe.experts
        first = own * self._slots_per_rank(layout)
        device = self._transport.device
        tokens = Tokens(
            self._states(slots.size),
            torch.from_numpy((first + slots).astype(np.int32))[:, None].to(device),
            torch.ones((slots.size, 1), device=device),
        )

        def run() -> tuple[float, float]:
            layers = self._banks * -(-_ROUNDS // len(self._banks))
            dist.barrier()
            if rests:
                dist.barrier()
                return np.nan, np.nan
            begin = self._now()
            for bank in layers:
                bank.partial_sums(tokens, self._counters)
            end = self._now()
            dist.barrier()
            return begin / len(layers), end / len(layers)

        return run

    def pairs(self, repeats: int) -> NDArray[np.float64]:
        """[sizes, G, G] microseconds one way between two ranks, the others at rest; medians.

        Both ranks send at once, so a time is that of both directions.
        """
        num_ranks, rank = self._transport.num_ranks, self._transport.rank
        found = np.zeros((repeats, len(_PAIR_BYTES), num_ranks, num_ranks))
        device = self._transport.device
        for repeat in range(repeats + 1):
            for size, num_bytes in enumerate(_PAIR_BYTES):
                rows = torch.zeros((1, num_bytes), dtype=torch.uint8, device=device)
                for one in range(num_ranks):
                    for other in range(one):
                        dist.barrier()
                        self._counters.reset()
                        if rank in (one, other):
                            peer = other if rank == one else one
                            with self._counters.timed(0, "dispatch"):
                                for _ in range(_ROUNDS):
                                    self._transport.exchange(
                                        {peer: rows}, {peer: 1}, num_bytes, "a probe",
                                        self._counters,
                                    )  # fmt: skip
                            seconds = self._counters.seconds.sum() / _ROUNDS
                            if repeat:  # the first warms up
                                found[repeat - 1, size, rank, peer] = seconds
        gathered = [np.empty(0)] * num_ranks
        dist.all_gather_object(gathered, np.median(found, axis=0))
        total: NDArray[np.float64] = np.sum(gathered, axis=0) * 1e6
        return total

    def _now(self) -> float:
        if self._transport.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _states(self, count: int) -> Tensor:
        made = torch.randn((count, self._size), device=self._transport.device)
        return made.to(self._dtype)

    def _slots_per_rank(self, layout: ModelLayout) -> int:
        return -(-layout.num_experts // self._transport.num_ranks)

    def _random_banks(self, layout: ModelLayout, placement: Placement) -> list[Bank]:
        """As many layers as the model has, or as fit: their weights are in no cache in turn."""
        transport, slots = self._transport, placement.slots_per_rank
        count = min(len(layout.layers), max(1, _MOST_BYTES // (slots * layout.expert_bytes)))
        path = layout.layers[0].experts
        banks = []
        for _ in range(count):
            module = copy.deepcopy(layout.model.get_submodule(path))
            for name, shape in layout.expert_parameters.items():
                held = torch.randn((slots, *shape), device=transport.device) * 0.02
                setattr(module, name, nn.Parameter(held.to(layout.dtype), requires_grad=False))
            module.num_experts = slots
            banks.append(Bank(module, placement, 0, transport.rank, transport.device))
        return banks


def routing_of(probe: Layer, num_experts: int, top_k: int, num_ranks: int) -> NDArray[np.int64]:
    """[G, tokens, K] the experts of every token: all experts in a shuffled order, again and again.

    Every expert gets G x tokens x K / E pairs where that is whole, and every token's are distinct.
    """
    order = np.random.default_rng(0).permutation(num_experts)
    pairs = np.arange(num_ranks * probe.tokens * top_k) % num_experts
    chosen: NDArray[np.int64] = order[pairs].reshape(num_ranks, probe.tokens, top_k)
    return chosen


def targets_of(probe: Exchange, context: RankContext) -> list[NDArray[np.int64]]:
    """[G] the rank that each token of each rank goes to."""
    num_ranks, per_node = context.num_ranks, context.ranks_per_node
    every: list[NDArray[np.int64]] = []
    for rank in range(num_ranks):
        node = rank // per_node * per_node
        sends = {"one": rank == 0, "first": rank == node}.get(probe.pattern, True)
        count = probe.tokens if sends else 0
        token = np.arange(count)
        if probe.pattern == "stay":
            targets = np.full(count, rank)
        elif probe.pattern in ("across", "first"):
            targets = np.full(count, (rank + per_node) % num_ranks)
        elif probe.pattern == "all":
            targets = (rank + token) % num_ranks
        else:
            targets = np.full(count, node + (rank + 1 - node) % per_node)
        every.append(targets.astype(np.int64))
    return every

"""Counting a trace into `Affinity`, chunk by chunk, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from placer.affinity.blocks import MOST_EXPERTS, blocks
from placer.affinity.groups import GroupKey
from placer.affinity.model import Affinity
from placer.trace.model import Trace

_MAX_PENDING = 2**32 - 1

Progress = Callable[[int], None]
"""Called with the number of tokens just counted."""


class AffinityCounter:
    """Counts chunks of one trace; memory is 5 tables of E x E per layer, whatever the tokens.

    The result does not depend on the number of threads or on the chunks: each layer is counted by
    one thread, in token order, into integers (see SCALE for tokens that use fewer experts).

    Args:
        num_experts: E.
        layer_ids: [L] the real layer numbers.
        threads: how many; by default as many as there are cores for this process.
    """

    def __init__(
        self, num_experts: int, layer_ids: NDArray[np.int64], threads: int | None = None
    ) -> None:
        if not 1 <= num_experts <= MOST_EXPERTS:
            raise ValueError(f"num_experts is {num_experts}, expected 1..{MOST_EXPERTS}")
        self._num_experts = num_experts
        self._layer_ids = np.asarray(layer_ids, np.int64)
        self._threads = threads or _available_cores()
        self._total: Affinity | None = None
        self._start(0)

    def _start(self, top_k: int) -> None:
        """Fresh tables; the system gives memory to them only where something is counted."""
        num_layers, size = self._layer_ids.size, self._num_experts**2
        between = max(num_layers - 1, 0)
        self._top_k = top_k
        self._pending = 0
        self._coactivation = np.zeros((num_layers, size), np.uint32)
        self._full = np.zeros((between, size), np.uint32)
        self._rest = np.zeros((between, size), np.float64)
        self._primary_affinity = np.zeros((between, size), np.uint32)
        self._primary_pairs = np.zeros((between, size), np.uint32)
        self._histogram = np.zeros((num_layers, top_k + 1), np.int64)

    def add(self, trace: Trace) -> None:
        """Count the tokens of `trace`. O(T L K^2).

        Raises:
            ValueError: other layers or experts than the ones that this counter counts.
        """
        if trace.num_experts != self._num_experts:
            raise ValueError(
                f"the chunk has {trace.num_experts} experts, expected {self._num_experts}"
            )
        if not np.array_equal(trace.layer_ids, self._layer_ids):
            raise ValueError(
                f"the chunk has layers {trace.layer_ids.tolist()}, "
                f"expected {self._layer_ids.tolist()}"
            )
        if trace.top_k != self._top_k:
            self._spill(trace.top_k)
        for block, ids in blocks(trace):
            if self._pending + len(ids) > _MAX_PENDING:
                self._spill(trace.top_k)
            weights = np.zeros((0, 0, 0), np.float32)
            if trace.weights is not None:
                weights = np.ascontiguousarray(trace.weights[block], np.float32)
            self._add_block(ids, weights)

    def _add_block(self, ids: NDArray[np.uint16], weights: NDArray[np.float32]) -> None:
        from placer.affinity.kernels import count_between, count_within

        def count(layer: int) -> None:
            histogram = self._histogram[layer]
            count_within(ids, layer, self._num_experts, self._coactivation[layer], histogram)
            if layer + 1 < self._layer_ids.size:
                count_between(
                    ids,
                    weights,
                    layer,
                    self._num_experts,
                    self._full[layer],
                    self._rest[layer],
                    self._primary_affinity[layer],
                    self._primary_pairs[layer],
                )

        layers = range(self._layer_ids.size)
        if self._threads == 1:
            for layer in layers:
                count(layer)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(count, layers))
        self._pending += len(ids)

    def _spill(self, top_k: int) -> None:
        """Move what is counted so far into the total, so that 32-bit tables never overflow."""
        if self._pending:
            part = self._part()
            self._total = part if self._total is None else self._total + part
        self._start(top_k)

    def _part(self) -> Affinity:
        from placer.affinity.kernels import SCALE

        num_layers, num_experts = self._layer_ids.size, self._num_experts
        shape = (num_layers, num_experts, num_experts)
        between = (max(num_layers - 1, 0), num_experts, num_experts)
        chosen = self._coactivation.reshape(shape).astype(np.int64)
        coactivation = chosen + chosen.transpose(0, 2, 1)
        diagonal = np.arange(num_experts)
        coactivation[:, diagonal, diagonal] = chosen[:, diagonal, diagonal]
        affinity = self._full.astype(np.float64)
        affinity *= SCALE / max(self._top_k, 1) ** 2
        affinity += self._rest
        affinity /= SCALE
        return Affinity(
            layer_ids=self._layer_ids,
            coactivation=coactivation,
            affinity=affinity.reshape(between),
            primary_affinity=self._primary_affinity.reshape(between).astype(np.int64),
            primary_pairs=self._primary_pairs.reshape(between).astype(np.int64),
            k_histogram=self._histogram.copy(),
        )

    def result(self) -> Affinity:
        """What has been counted so far."""
        part = self._part()
        return part if self._total is None else self._total + part


def count(trace: Trace, *, threads: int | None = None) -> Affinity:
    """Count a trace that is in memory."""
    counter = AffinityCounter(trace.num_experts, trace.layer_ids, threads)
    counter.add(trace)
    return counter.result()


def count_chunks(
    chunks: Iterable[Trace], *, progress: Progress | None = None, threads: int | None = None
) -> Affinity:
    """Count a trace that comes in chunks; the result is the same as of the whole trace.

    Raises:
        ValueError: there are no chunks, or they are not of one model.
    """
    counter: AffinityCounter | None = None
    for chunk in chunks:
        if counter is None:
            counter = AffinityCounter(chunk.num_experts, chunk.layer_ids, threads)
        counter.add(chunk)
        if progress is not None:
            progress(chunk.num_tokens)
    if counter is None:
        raise ValueError("there is nothing to count: no chunks")
    return counter.result()


def count_by(
    chunks: Iterable[Trace],
    key: GroupKey,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> dict[str, Affinity]:
    """Count each group of tokens apart, in one pass. Memory: the tables of one count per group.

    Args:
        chunks: the trace.
        key: `phase_of`, `label_of`, or another; see `placer.affinity.groups`.
        progress: told of the tokens counted.
        threads: how many.

    Returns:
        group -> its counts, sorted by group; their sum is the count of the whole trace.
    """
    counters: dict[str, AffinityCounter] = {}
    for chunk in chunks:
        names, index = key(chunk)
        present = np.nonzero(np.bincount(index, minlength=len(names)))[0].tolist()
        for group in present:
            name = names[group]
            if name not in counters:
                counters[name] = AffinityCounter(chunk.num_experts, chunk.layer_ids, threads)
            counters[name].add(chunk if len(present) == 1 else chunk.select(index == group))
        if progress is not None:
            progress(chunk.num_tokens)
    return {name: counters[name].result() for name in sorted(counters)}


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

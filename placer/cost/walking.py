"""Counting what batches of a trace send and compute under a placement."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placer.cost.batching import Batching
from placer.cost.pricing import Counts, Priced, Pricing
from placer.cost.serving import Server, kernel_arrays, turns_of
from placer.trace.model import Trace
from solvers.problem import Dispatch

_GROUP_BYTES = 2**23


class Setting(NamedTuple):
    """What is walked, and how.

    Attributes:
        trace: the tokens.
        home: [T] rank where each token enters.
        server: which copy serves a pair.
        dispatch: the dispatch model.
        deduplicate: one copy per remote node.
        ranks_per_leaf: ranks below one leaf of the network.
        with_pairs: count states from rank to rank as well.
        increments: [M] of the measured curve of an expert's time; empty without one.
    """

    trace: Trace
    home: NDArray[np.int32]
    server: Server
    dispatch: Dispatch
    deduplicate: bool
    ranks_per_leaf: int
    with_pairs: bool
    increments: NDArray[np.float64]


def price_batches(setting: Setting, batching: Batching, pricing: Pricing) -> list[Priced]:
    """Count and price groups of batches, in their order, on all cores; the kernels need no GIL."""
    placement = setting.server.placement
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    table = num_layers * num_ranks
    per_batch = table * (72 + 8 * num_ranks * setting.with_pairs) + 16 * len(pricing.links.names)
    per_batch += setting.server.nothing_sent(1).nbytes
    even = -(-batching.num_batches // (4 * available_cores()))
    size = max(1, min(_GROUP_BYTES // per_batch, even))
    firsts = range(0, max(1, batching.num_batches), size)
    spare: list[_Walk] = []

    def run(first: int) -> Priced:
        walk = spare.pop() if spare else _Walk(setting)
        found = pricing.price(walk.counts(batching, first, size))
        spare.append(walk)
        return found

    workers = min(len(firsts), available_cores())
    if workers == 1:
        return [run(first) for first in firsts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, firsts))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_batches(setting: Setting, batching: Batching, size: int = 64) -> Iterator[Counts]:
    """Counts of groups of batches, in their order."""
    walk = _Walk(setting)
    for first in range(0, batching.num_batches, size):
        yield walk.counts(batching, first, size)


class _Walk:
    """Counts batches one group after the other; one thread at a time."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        placement = setting.server.placement
        shape = (placement.num_layers, placement.num_experts, placement.num_ranks)
        self._last = np.zeros(shape, np.int64)
        self._times = np.zeros(shape if setting.increments.size else (0, 0, 0), np.int32)
        self._stamp = 1

    def counts(self, batching: Batching, first: int, size: int) -> Counts:
        """Of the batches from `first` on, at most `size`."""
        from placer.cost import transfer_kernels

        trace, home_of, server, dispatch, deduplicate, *_ = self._setting
        ranks_per_leaf, with_pairs, increments = self._setting[5:]
        placement = server.placement
        starts = batching.starts[first : first + size + 1]
        sizes = np.diff(starts)
        n, num_layers, num_ranks = sizes.size, placement.num_layers, placement.num_ranks
        tokens = batching.order[starts[0] : starts[-1]]
        batch = np.repeat(np.arange(n, dtype=np.int32), sizes)
        experts, weights = kernel_arrays(trace, tokens)
        home = home_of[tokens]
        served = server.serve(
            experts, weights, home, turns_of(trace, tokens), batch, server.nothing_sent(n)
        )
        found = Counts(
            sizes,
            np.zeros((n, num_layers, 4, 2, num_ranks), np.int32),
            np.zeros((n, num_layers, 4, 2, num_ranks), np.int32),
            np.zeros((n if with_pairs else 0, num_layers, 2, num_ranks, num_ranks), np.int32),
            np.zeros((n, num_layers, num_ranks), np.int32),
            np.zeros((n, num_layers, num_ranks), np.int32),
            np.zeros((n if increments.size else 0, num_layers, num_ranks)),
        )
        if dispatch != "allgather":
            transfer_kernels.transfers(
                served,
                weights,
                home,
                batch,
                dispatch == "coherent",
                deduplicate,
                placement.ranks_per_node,
                ranks_per_leaf,
                found.dispatch,
                found.combine,
                found.pairs_of_ranks,
            )
            if dispatch == "alltoall":  # results come back the way that tokens went
                found.combine[:] = found.dispatch[:, :, :, ::-1]
                found.pairs_of_ranks[:, :, 1] = found.pairs_of_ranks[:, :, 0].swapaxes(2, 3)
        transfer_kernels.activate(
            experts,
            served,
            batch,
            found.pairs,
            found.activated,
            self._last,
            self._stamp,
            increments,
            self._times,
            found.curve_us,
        )
        self._stamp += n
        return found

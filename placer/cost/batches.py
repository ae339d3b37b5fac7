"""Rank loads of batches: kept while a batch is open, reduced to a few figures when it closes.

A batch's figures are also taken J times with one group of requests left out, which is what the
intervals of the batch figures are made of (see `placer.cost.intervals`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_GROUPS = 16
_OPEN_BYTES = 2**28
_LEAST_OPEN = 16
_SGLANG_EPSILON = 1e-5


@dataclass(frozen=True, eq=False)
class BatchFigures:
    """Balance within batches; J groups of requests, N batches, L layers.

    Row 0 is over all requests, row j + 1 leaves out the requests of group j. A batch that keeps
    less than half of its pairs without a group is left out of that row (NaN).

    Attributes:
        how: how the batches were made, in words.
        num_batches: N, complete batches that the figures are over.
        imbalance: [1 + J, N] mean over layers of max / mean rank load.
        utilization: [1 + J, N] mean over layers of mean / max rank load, as SGLang computes it.
        pooled: [1 + J, N] sum over layers of mean / sum over layers of max rank load, as vLLM logs
            it.
        excess: [1 + J, L] sum over batches of max / mean - 1.
        loaded: [1 + J, L] batches with load in that layer.
        group_used: [J] whether any request belongs to the group.
    """

    how: str
    num_batches: int
    imbalance: NDArray[np.float64]
    utilization: NDArray[np.float64]
    pooled: NDArray[np.float64]
    excess: NDArray[np.float64]
    loaded: NDArray[np.float64]
    group_used: NDArray[np.bool_]


class BatchLoads:
    """Rank loads of the open batches.

    Args:
        num_layers: L.
        num_ranks: G.
        with_sent: keep what every home rank has sent as well (the policy `local` needs it).

    Memory: at most 256 MiB of open batches. A batch that has to be closed early and turns up
    again counts as a second batch; that needs recorded forward passes whose tokens lie far apart.
    """

    def __init__(self, num_layers: int, num_ranks: int, *, with_sent: bool) -> None:
        per_batch = (NUM_GROUPS + with_sent * num_ranks) * num_layers * num_ranks * 4
        self.max_open = max(_LEAST_OPEN, _OPEN_BYTES // per_batch)
        self._slots: dict[int, int] = {}  # batch -> slot, least recently used first
        self._free: list[int] = []
        self.loads = np.zeros((0, NUM_GROUPS, num_layers, num_ranks), np.int32)
        self.sent = np.zeros((0, num_ranks, num_layers, num_ranks), np.int32)
        self._with_sent = with_sent
        self._imbalance: list[NDArray[np.float64]] = []
        self._utilization: list[NDArray[np.float64]] = []
        self._pooled: list[NDArray[np.float64]] = []
        self._excess = np.zeros((NUM_GROUPS + 1, num_layers))
        self._loaded = np.zeros((NUM_GROUPS + 1, num_layers))
        self._group_used = np.zeros(NUM_GROUPS, np.bool_)

    def slots_of(self, batch: NDArray[np.int64]) -> NDArray[np.int32]:
        """[T] slot of each token's batch; opens batches, closing old ones when there are many.

        `batch` must hold at most `max_open` distinct numbers.
        """
        distinct, inverse = np.unique(batch, return_inverse=True)
        wanted = [int(number) for number in distinct]
        for number in wanted:
            if number in self._slots:  # move to the recent end
                self._slots[number] = self._slots.pop(number)
        unopened = [number for number in wanted if number not in self._slots]
        surplus = len(self._slots) + len(unopened) - self.max_open
        if surplus > 0:
            self.close(list(self._slots)[:surplus])
        self._grow(len(unopened))
        for number in unopened:
            self._slots[number] = self._free.pop()
        slots = np.array([self._slots[number] for number in wanted], np.int32)
        return slots[inverse.reshape(-1)]

    def close_below(self, batch: int) -> None:
        """Close every open batch whose number is smaller than `batch`."""
        self.close([number for number in self._slots if number < batch])

    def discard(self, batch: int) -> None:
        """Forget an open batch."""
        self._release([batch])

    def close(self, batches: list[int]) -> None:
        """Reduce these open batches to their figures, in this order."""
        if batches:
            self._reduce(self.loads[[self._slots[number] for number in batches]])
            self._release(batches)

    def finish(self, how: str) -> BatchFigures:
        """Close what is open, by batch number, and give the figures."""
        self.close(sorted(self._slots))
        none = np.zeros((NUM_GROUPS + 1, 0))
        imbalance = np.concatenate([none, *self._imbalance], axis=1)
        return BatchFigures(
            how,
            int(np.isfinite(imbalance[0]).sum()),
            imbalance,
            np.concatenate([none, *self._utilization], axis=1),
            np.concatenate([none, *self._pooled], axis=1),
            self._excess,
            self._loaded,
            self._group_used,
        )

    def _grow(self, wanted: int) -> None:
        missing = wanted - len(self._free)
        if missing <= 0:
            return
        size = self.loads.shape[0]
        added = min(max(missing, size), max(missing, self.max_open - size))
        self.loads = np.concatenate(
            [self.loads, np.zeros((added, *self.loads.shape[1:]), np.int32)]
        )
        if self._with_sent:
            more = np.zeros((added, *self.sent.shape[1:]), np.int32)
            self.sent = np.concatenate([self.sent, more])
        self._free += range(size + added - 1, size - 1, -1)

    def _release(self, batches: list[int]) -> None:
        for number in batches:
            slot = self._slots.pop(number)
            self.loads[slot] = 0
            if self._with_sent:
                self.sent[slot] = 0
            self._free.append(slot)

    def _reduce(self, loads: NDArray[np.int32]) -> None:
        """Take the figures of batches with these loads [n, J, L, G]."""
        present: NDArray[np.bool_] = np.greater(loads.max(axis=(2, 3)), 0)
        self._group_used |= present.any(axis=0)
        total = loads.sum(axis=1)
        pairs = total.sum(axis=(1, 2))
        whole = _figures(total, pairs)
        rows = [whole]
        for group in range(NUM_GROUPS):
            row = whole
            changed = np.flatnonzero(present[:, group])
            if changed.size:
                row = tuple(figure.copy() for figure in whole)
                kept = _figures(total[changed] - loads[changed, group], pairs[changed])
                for figure, new in zip(row, kept, strict=True):
                    figure[changed] = new
            rows.append(row)
        imbalance, utilization, pooled, excess, loaded = zip(*rows, strict=True)
        self._imbalance.append(np.stack(imbalance))
        self._utilization.append(np.stack(utilization))
        self._pooled.append(np.stack(pooled))
        self._excess += np.stack([figure.sum(axis=0) for figure in excess])
        self._loaded += np.stack([figure.sum(axis=0) for figure in loaded])


def _figures(
    loads: NDArray[np.int32], all_pairs: NDArray[np.int64]
) -> tuple[NDArray[np.float64], ...]:
    """Imbalance, utilization and pooled [n]; max / mean - 1 and whether there is load [n, L].

    Of loads [n, L, G]; nothing counts where less than half of a batch's `all_pairs` [n] is left.
    """
    mean = loads.mean(axis=2)
    peak = loads.max(axis=2)
    left = loads.sum(axis=(1, 2))
    enough: NDArray[np.bool_] = np.logical_and(2 * left >= all_pairs, left > 0)
    loaded = np.logical_and(peak > 0, enough.reshape(-1, 1))
    ratio = np.divide(peak, mean, out=np.zeros_like(mean), where=loaded)
    imbalance = np.full(loads.shape[0], np.nan)
    np.divide(ratio.sum(axis=1), loaded.sum(axis=1), out=imbalance, where=enough)
    utilization = ((mean + _SGLANG_EPSILON) / (peak + _SGLANG_EPSILON)).mean(axis=1)
    pooled = np.full(loads.shape[0], np.nan)
    np.divide(mean.sum(axis=1), peak.sum(axis=1), out=pooled, where=enough)
    return (
        imbalance,
        np.where(enough, utilization, np.nan),
        pooled,
        np.where(loaded, ratio - 1, 0.0),
        loaded.astype(np.float64),
    )

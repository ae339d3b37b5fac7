"""Loads of many parts of a trace: of every workload label, and of earlier and later requests.

A load is small (L x E), so that hundreds of parts fit where their whole counts would not.

Shape letters: T tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.affinity.blocks import blocks
from placer.affinity.groups import label_of
from placer.trace.model import Trace

_MOST_RANGES = 64


@dataclass(eq=False)
class PartLoad:
    """The load of some tokens.

    Attributes:
        load: [L, E] token-expert pairs.
        tokens: [L] tokens that used experts of the layer.
        num_tokens: tokens, whether they used experts or not.
    """

    load: NDArray[np.int64]
    tokens: NDArray[np.int64]
    num_tokens: int

    def __add__(self, other: PartLoad) -> PartLoad:
        return PartLoad(
            self.load + other.load, self.tokens + other.tokens, self.num_tokens + other.num_tokens
        )

    def __sub__(self, other: PartLoad) -> PartLoad:
        return PartLoad(
            self.load - other.load, self.tokens - other.tokens, self.num_tokens - other.num_tokens
        )


def part_loads(trace: Trace, part: NDArray[np.integer], num_parts: int) -> list[PartLoad]:
    """Loads of the parts 0 .. num_parts - 1 of a trace; `part` [T] says whose each token is."""
    from placer.affinity.kernels import count_parts

    shape = (num_parts, trace.num_layers, trace.num_experts)
    load, tokens = np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64)
    for block, ids in blocks(trace):
        count_parts(ids, np.ascontiguousarray(part[block], np.int64), load, tokens)
    sizes = np.bincount(part, minlength=num_parts)
    return [PartLoad(load[i], tokens[i], int(sizes[i])) for i in range(num_parts)]


def total(parts: Iterable[PartLoad]) -> PartLoad | None:
    """The sum of the parts; None when there are none."""
    result: PartLoad | None = None
    for part in parts:
        result = part if result is None else result + part
    return result


class LabelLoads:
    """Load of every workload label. Memory: a load per label."""

    def __init__(self) -> None:
        self.loads: dict[str, PartLoad] = {}

    def add(self, trace: Trace) -> None:
        names, part = label_of(trace)
        for name, load in zip(names, part_loads(trace, part, len(names)), strict=True):
            known = self.loads.get(name)
            self.loads[name] = load if known is None else known + load


class RequestLoads:
    """Load of ranges of request ids, so that earlier and later requests can be told apart.

    Ranges hold 2**shift ids each; shift grows so that there are never more than 64 of them.
    """

    def __init__(self) -> None:
        self._shift = 0
        self._ranges: dict[int, PartLoad] = {}

    def add(self, trace: Trace) -> None:
        while True:
            ranges, part = np.unique(trace.request >> self._shift, return_inverse=True)
            if len({*self._ranges, *ranges.tolist()}) <= _MOST_RANGES:
                break
            self._widen()
        for number, load in zip(ranges.tolist(), part_loads(trace, part, len(ranges)), strict=True):
            self._put(number, load)

    def halves(self) -> tuple[PartLoad, PartLoad] | None:
        """The load of the requests with lower and with higher ids, about half of the tokens each.

        None when there are fewer than two ranges.
        """
        numbers = sorted(self._ranges)
        if len(numbers) < 2:
            return None
        running = np.cumsum([self._ranges[number].num_tokens for number in numbers])
        cut = int(np.abs(running[:-1] - running[-1] / 2).argmin()) + 1
        lower = total(self._ranges[number] for number in numbers[:cut])
        higher = total(self._ranges[number] for number in numbers[cut:])
        assert lower is not None
        assert higher is not None
        return lower, higher

    def _widen(self) -> None:
        self._shift += 1
        before, self._ranges = self._ranges, {}
        for number, load in before.items():
            self._put(number >> 1, load)

    def _put(self, number: int, load: PartLoad) -> None:
        known = self._ranges.get(number)
        self._ranges[number] = load if known is None else known + load

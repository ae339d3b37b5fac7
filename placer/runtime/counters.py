"""What a rank sent and how long it took, counted while it runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from placer.trace import PREFILL

Link = Literal["same_rank", "same_node", "other_node"]
Part = Literal["dispatch", "compute", "combine"]
LINKS: tuple[Link, ...] = ("same_rank", "same_node", "other_node")
PARTS: tuple[Part, ...] = ("dispatch", "compute", "combine")


@dataclass(eq=False)
class Counters:
    """Figures of one rank; all measured, none modelled.

    Message = one hidden state that goes from this rank to one other (or stays: `same_rank`).

    Attributes:
        num_layers: L.
        device: "cuda" to wait for the device before the clock is read.
        messages: [L, 2, 3] hidden states by layer, way (0 dispatch, 1 combine) and link.
        hidden_bytes: [L, 2, 3] bytes of those hidden states.
        routing_bytes: [L, 2, 3] bytes of slot ids, weights and row numbers that go with them.
        phase: what runs now, PREFILL or DECODE of `placer.trace`.
        seconds: [2, L, 3] by phase, layer and part, waiting for other ranks included.
        context_seconds: [2] of the exchanges that end passes (next tokens; under `coherent` also
            keys and values), likewise.
        pairs: [L] token-expert pairs that this rank computed.
        kv_bytes: [3] bytes of keys and values that this rank sent, by link.
        control_bytes: bytes of next tokens and headers that this rank sent.
        collectives: name -> how many collective operations this rank took part in.
    """

    num_layers: int
    device: str = "cpu"
    phase: int = PREFILL
    messages: NDArray[np.int64] = field(init=False)
    hidden_bytes: NDArray[np.int64] = field(init=False)
    routing_bytes: NDArray[np.int64] = field(init=False)
    seconds: NDArray[np.float64] = field(init=False)
    context_seconds: NDArray[np.float64] = field(init=False)
    pairs: NDArray[np.int64] = field(init=False)
    kv_bytes: NDArray[np.int64] = field(init=False)
    control_bytes: int = 0
    collectives: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from zero, for example after a warm-up."""
        shape = (self.num_layers, 2, len(LINKS))
        self.messages = np.zeros(shape, np.int64)
        self.hidden_bytes = np.zeros(shape, np.int64)
        self.routing_bytes = np.zeros(shape, np.int64)
        self.seconds = np.zeros((2, self.num_layers, len(PARTS)))
        self.context_seconds = np.zeros(2)
        self.pairs = np.zeros(self.num_layers, np.int64)
        self.kv_bytes = np.zeros(len(LINKS), np.int64)
        self.control_bytes = 0
        self.collectives = Counter()

    @contextmanager
    def timed(self, layer: int, part: Part) -> Iterator[None]:
        """Add the time that the block takes to `seconds`."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[self.phase, layer, PARTS.index(part)] += self._now() - start

    @contextmanager
    def timed_context(self) -> Iterator[None]:
        """Add the time that the block takes to `context_seconds`."""
        start = self._now()
        try:
            yield
        finally:
            self.context_seconds[self.phase] += self._now() - start

    def sent(
        self, layer: int, way: int, link: Link, count: int, hidden_bytes: int, routing_bytes: int
    ) -> None:
        """Count hidden states of one destination; sizes are of one."""
        at = (layer, way, LINKS.index(link))
        self.messages[at] += count
        if link != "same_rank":
            self.hidden_bytes[at] += count * hidden_bytes
            self.routing_bytes[at] += count * routing_bytes

    def document(self) -> dict[str, Any]:
        """The figures as JSON."""
        by_link = {
            "messages": self.messages.sum(axis=(0, 1)),
            "hidden_bytes": self.hidden_bytes.sum(axis=(0, 1)),
            "routing_bytes": self.routing_bytes.sum(axis=(0, 1)),
            "kv_bytes": self.kv_bytes,
        }
        totals = self.seconds.sum(axis=(0, 1))
        return {
            **{
                name: dict(zip(LINKS, (int(v) for v in values), strict=True))
                for name, values in by_link.items()
            },
            "control_bytes": self.control_bytes,
            "pairs": int(self.pairs.sum()),
            "seconds": {
                **dict(zip(PARTS, (float(v) for v in totals), strict=True)),
                "context": float(self.context_seconds.sum()),
            },
            "collectives": dict(sorted(self.collectives.items())),
        }

    def _now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

"""Whole requests of a trace in memory, in order: what is needed where the order of tokens counts.

Shape letters: T tokens, R requests, J groups of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from placer.trace.model import Trace
from placer.trace.source import TraceSource
from placer.trace.split import scramble

NUM_GROUPS = 16
"""Groups of requests that the jackknife leaves out in turn."""

_MOST_IDS = 1 << 22


@dataclass(frozen=True, eq=False)
class Sample:
    """Whole requests, each one's tokens together and in the order of their positions.

    Attributes:
        trace: T tokens, sorted by request, then position.
        starts: [R + 1] where each request begins in `trace`, and T.
        of_tokens, of_requests: how many the whole trace has.
    """

    trace: Trace
    starts: NDArray[np.int64]
    of_tokens: int
    of_requests: int

    @property
    def num_requests(self) -> int:
        return self.starts.size - 1

    @cached_property
    def experts(self) -> NDArray[np.int32]:
        """[T, L, K] expert ids, contiguous."""
        return np.ascontiguousarray(self.trace.experts, np.int32)

    @cached_property
    def group_of_request(self) -> NDArray[np.int64]:
        """[R] group of each request, 0 .. J-1, as even as whole requests allow."""
        ids = self.trace.request[self.starts[:-1]]
        rank = np.empty(ids.size, np.int64)
        rank[np.argsort(scramble(ids, seed=1))] = np.arange(ids.size)
        return rank % NUM_GROUPS

    @cached_property
    def group_of_token(self) -> NDArray[np.int64]:
        """[T] group of each token's request."""
        return np.repeat(self.group_of_request, np.diff(self.starts))


def sample_requests(source: TraceSource, most_tokens: int | None = None) -> Sample:
    """Whole requests, drawn without a pattern, until there are about `most_tokens` tokens.

    By default as many as keep the sample at 4 million expert ids. At least one request is taken.
    The draw depends on the request ids alone.
    """
    if most_tokens is None:
        most_tokens = max(1024, _MOST_IDS // (source.num_layers * source.top_k))
    ids, sizes = request_sizes(source)
    chosen = ids
    if source.num_tokens > most_tokens:
        order = np.argsort(scramble(ids, seed=0))
        enough = int(np.searchsorted(np.cumsum(sizes[order]), most_tokens)) + 1
        chosen = np.sort(ids[order[:enough]])
    part = source if chosen.size == ids.size else source.filtered(requests=chosen)
    trace = part.read()
    trace = trace.select(np.lexsort((trace.position, trace.request)))  # type: ignore[arg-type]
    starts = np.flatnonzero(np.r_[True, trace.request[1:] != trace.request[:-1], True])
    return Sample(trace, starts.astype(np.int64), source.num_tokens, int(ids.size))


def request_sizes(source: TraceSource) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct request ids, increasing, and the tokens of each."""
    found: dict[int, int] = {}
    for part in source.token_columns(["request"]):
        ids, counts = np.unique(part["request"], return_counts=True)
        for request, count in zip(ids.tolist(), counts.tolist(), strict=True):
            found[request] = found.get(request, 0) + count
    ids = np.array(sorted(found), np.int64)
    return ids, np.array([found[request] for request in ids.tolist()], np.int64)

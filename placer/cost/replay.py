"""Replay a trace under a placement: additive sums per request, rank loads, batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from placer.cost.batches import NUM_GROUPS, BatchFigures, BatchLoads
from placer.cost.order import concatenate, interleave
from placer.cost.serving import ReplicaPolicy, Server, home_ranks, kernel_arrays, turns_of
from placer.errors import UsageError
from placer.placement import Placement
from placer.trace.model import Trace
from solvers.problem import Dispatch

SUMS = (
    "token_layers",
    "span",
    "messages_alltoall",
    "messages_coherent",
    "node_span",
    "node_messages_alltoall",
    "node_messages_coherent",
    "pairs",
    "cross_rank_pairs",
    "cross_node_pairs",
    "transitions",
    "cross_rank_per_token",
    "cross_node_per_token",
)
_MAX_BLOCKS = 2048
_SLICE_TOKENS = 8192
_MIXED_TOKENS = 2**18


@dataclass(frozen=True, eq=False)
class Replay:
    """What a placement costs on a trace, in sums that a bootstrap over requests can reweigh.

    R request blocks: one per request, in the order of first appearance; with more than 2048
    requests, request number i belongs to block i mod 2048.

    Attributes:
        dispatch: the dispatch model whose homes decided which copies served the pairs that
            `loads`, the batches, span and cross-rank counts are made of.
        replica_policy: how a copy was chosen where an expert has several.
        num_tokens: T.
        num_requests: distinct requests.
        sums: [R, len(SUMS)] float64 sums over the block's tokens; the names are in `SUMS`.
        loads: [R, L, G] int64 token-expert pairs served by each rank.
        batches: balance within recorded forward passes, else runs of consecutive tokens.
        mixed_batches: the same with tokens taken round-robin over requests; None when not asked.
    """

    dispatch: Dispatch
    replica_policy: ReplicaPolicy
    num_tokens: int
    num_requests: int
    sums: NDArray[np.float64]
    loads: NDArray[np.int64]
    batches: BatchFigures
    mixed_batches: BatchFigures | None

    @property
    def rank_load(self) -> NDArray[np.int64]:
        """[L, G] pairs served by each rank over the whole trace."""
        loads: NDArray[np.int64] = self.loads.sum(axis=0)
        return loads

    def total(self, name: str) -> float:
        """Sum of one column of `sums` over all requests."""
        return float(self.sums[:, SUMS.index(name)].sum())


def replay(
    source: Trace | Iterable[Trace],
    placement: Placement,
    *,
    dispatch: Dispatch = "alltoall",
    replica_policy: ReplicaPolicy = "local",
    batch_tokens: int = 256,
    mixed_batches: bool = True,
    ignore_home: bool = False,
) -> Replay:
    """Send every token of a trace to the ranks that the placement says, and count.

    O(T L K) without replicas, O(T L K C) with up to C copies. Beside the chunk at hand, memory
    holds [min(R, 2048), L, G] loads, at most 256 MiB of open batches and, for mixed batches,
    the first 262,144 tokens.

    Args:
        source: a trace, or its chunks in order; a request may go on in a later chunk.
        placement: where the experts are; same layers and experts as the trace.
        dispatch: whose home ranks decide which copy serves a token. Messages are counted for
            both `alltoall` and `coherent` whatever this says, each with its own homes.
        replica_policy: `local` or `round_robin`; see docs/metrics.md.
        batch_tokens: tokens of a batch where the trace records no forward passes.
        mixed_batches: take the batch figures a second time, tokens mixed from all requests.
        ignore_home: home = request mod num_ranks even where the trace recorded homes.

    Raises:
        UsageError: trace and placement do not fit together.
    """
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens}, expected at least 1")
    chunks = iter([source] if isinstance(source, Trace) else source)
    first = next(chunks, None)
    if first is None:
        raise UsageError("there is nothing to replay: the trace has no chunks")
    by_step = first.step is not None
    main = _Pass(placement, dispatch, replica_policy, ignore_home)
    # With replicas under `local` the two dispatch models serve different copies.
    split = main.server.depends_on_home
    other: Dispatch = "alltoall" if dispatch == "coherent" else "coherent"
    second = _Pass(placement, other, replica_policy, ignore_home) if split else None
    kept: list[Trace] = []
    num_kept = 0
    with ThreadPoolExecutor(1) as beside:  # the kernels need no GIL
        for chunk in chain([first], chunks):
            if (chunk.step is not None) != by_step:
                raise UsageError(
                    "some chunks of this trace record forward passes and others do not"
                )
            other_half = beside.submit(second.add, chunk, batch_tokens) if second else None
            main.add(chunk, batch_tokens)
            if other_half is not None:
                other_half.result()
            room = _MIXED_TOKENS - num_kept
            if mixed_batches and room > 0:
                fits = chunk.num_tokens <= room
                kept.append(chunk if fits else chunk.select(np.arange(chunk.num_tokens) < room))
                num_kept += kept[-1].num_tokens
    sums = main.sums
    if second is not None:
        sums = sums.copy()
        for name in ("messages", "node_messages"):
            column = SUMS.index(f"{name}_{other}")
            sums[:, column] = second.sums[:, column]
    how = "recorded forward passes" if by_step else f"{batch_tokens} consecutive tokens"
    mixed = None
    if mixed_batches:
        run = _Pass(placement, dispatch, replica_policy, ignore_home)
        run.add(interleave(concatenate(kept)), batch_tokens)
        note = f"{batch_tokens} tokens taken round-robin over requests"
        if num_kept < main.num_tokens:
            note += f" (of the first {num_kept} tokens)"
        mixed = run.finish_batches(note)
    return Replay(
        dispatch,
        replica_policy,
        main.num_tokens,
        len(main.ordinals),
        sums,
        main.loads,
        main.finish_batches(how),
        mixed,
    )


class _Pass:
    """One walk over the tokens under one dispatch model.

    Attributes:
        server: which copy serves a pair.
        num_tokens: tokens so far.
        ordinals: request id -> its number in the order of first appearance.
        sums, loads: as in `Replay`.
    """

    def __init__(
        self,
        placement: Placement,
        dispatch: Dispatch,
        replica_policy: ReplicaPolicy,
        ignore_home: bool,
    ) -> None:
        self.server = Server(placement, dispatch, replica_policy)
        self._ignore_home = ignore_home
        self.num_tokens = 0
        self.ordinals: dict[int, int] = {}
        num_layers, num_ranks = placement.num_layers, placement.num_ranks
        self.sums = np.zeros((0, len(SUMS)))
        self.loads = np.zeros((0, num_layers, num_ranks), np.int64)
        self._open = BatchLoads(num_layers, num_ranks, with_sent=self.server.depends_on_home)
        self._unfinished: int | None = None  # the last batch, while it is not full

    def add(self, chunk: Trace, batch_tokens: int) -> None:
        """Count a chunk's tokens."""
        self.server.check(chunk)
        num_ranks = self.server.placement.num_ranks
        home = home_ranks(chunk, num_ranks, ignore_home=self._ignore_home)
        ordinal = self._ordinals_of(chunk.request)
        for part in self._slices(chunk.num_tokens, batch_tokens, by_step=chunk.step is not None):
            index = self.num_tokens + np.arange(part.stop - part.start)
            if chunk.step is None:
                batch = index // batch_tokens
                self._open.close_below(int(batch[0]))
            else:
                batch = chunk.step[part]
            self._add_slice(chunk, part, home[part], ordinal[part], batch)
        if chunk.step is None and self.num_tokens:
            full, rest = divmod(self.num_tokens, batch_tokens)
            self._unfinished = full if rest and full else None

    def finish_batches(self, how: str) -> BatchFigures:
        """The batch figures; an incomplete last batch is left out when there is another."""
        if self._unfinished is not None:
            self._open.discard(self._unfinished)
        return self._open.finish(how)

    def _ordinals_of(self, request: NDArray[np.int64]) -> NDArray[np.int64]:
        """[T] number of each token's request, in the order of first appearance."""
        distinct, first, inverse = np.unique(request, return_index=True, return_inverse=True)
        for index in np.argsort(first):
            self.ordinals.setdefault(int(distinct[index]), len(self.ordinals))
        known = np.array([self.ordinals[int(number)] for number in distinct], np.int64)
        missing = min(len(self.ordinals), _MAX_BLOCKS) - self.sums.shape[0]
        if missing > 0:
            self.sums = np.concatenate([self.sums, np.zeros((missing, self.sums.shape[1]))])
            more = np.zeros((missing, *self.loads.shape[1:]), np.int64)
            self.loads = np.concatenate([self.loads, more])
        return known[inverse.reshape(-1)]

    def _slices(self, num_tokens: int, batch_tokens: int, *, by_step: bool) -> Iterator[slice]:
        """Slices of a chunk that open no more batches than there is room for."""
        size = min(_SLICE_TOKENS, (self._open.max_open - 1) * (1 if by_step else batch_tokens))
        for start in range(0, num_tokens, size):
            yield slice(start, min(start + size, num_tokens))

    def _add_slice(
        self,
        chunk: Trace,
        part: slice,
        home: NDArray[np.int32],
        ordinal: NDArray[np.int64],
        batch: NDArray[np.int64],
    ) -> None:
        from placer.cost import counting_kernels

        experts, weights = kernel_arrays(chunk, part)
        slots = self._open.slots_of(batch)
        block = ordinal % _MAX_BLOCKS
        counting_kernels.count(
            self.server.serve(
                experts, weights, home, turns_of(chunk, part), slots, self._open.sent
            ),
            weights,
            home,
            block.astype(np.int32),
            self.server.placement.ranks_per_node,
            self.sums,
            self.loads,
            slots,
            (block % NUM_GROUPS).astype(np.int32),
            self._open.loads,
        )
        self.num_tokens += experts.shape[0]

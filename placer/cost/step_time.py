"""Modelled step time: what a batch costs on a cluster under each dispatch model.

Everything here is modelled, from a trace, a placement, a cluster's figures and a model's
dimensions; nothing is measured. docs/metrics.md has the formulas and an example worked by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster
from placer.cost.order import concatenate, interleave
from placer.cost.pricing import PARTS, Counts, Pricing, Times, Transport
from placer.cost.serving import ReplicaPolicy, Server, home_ranks, kernel_arrays, turns_of
from placer.errors import UsageError
from placer.placement import Placement
from placer.trace.model import ModelDims, Trace
from solvers.problem import Dispatch

_MAX_TOKENS = 2**18
_GROUP_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class StepTime:
    """Modelled times of N batches, microseconds summed over layers.

    Attributes:
        dispatch: the dispatch model.
        how: how the batches were made, in words.
        num_tokens: [N] tokens of each batch.
        dispatch_us, combine_us: [N] transfers to the experts and back, latency included; None
            where a dimension is missing.
        compute_us: [N] expert computation; None where a dimension is missing.
        kv_us: [N] all-gather of new KV (coherent only, else zeros); None where unknown.
        latency_us: [N] the part of all transfers that is latency.
        total_us: [N] dispatch + compute + combine + KV; None where one of them is.
        bottleneck_rank: [N] the rank that most of the known time is spent waiting for.
        missing: dimensions that would be needed for what is None.
    """

    dispatch: Dispatch
    how: str
    num_tokens: NDArray[np.int64]
    dispatch_us: Times | None
    compute_us: Times | None
    combine_us: Times | None
    kv_us: Times | None
    latency_us: Times | None
    total_us: Times | None
    bottleneck_rank: NDArray[np.int64]
    missing: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """As JSON: mean, median and 95th percentile of the total, means of the parts."""
        total = self.total_us if self.total_us is not None and self.total_us.size else None
        document: dict[str, Any] = {
            "modelled": True,
            "dispatch": self.dispatch,
            "batches": self.how,
            "num_batches": int(self.num_tokens.size),
            "missing": list(self.missing),
            "total_us": None if total is None else float(total.mean()),
        }
        for name, q in (("p50", 0.5), ("p95", 0.95)):
            document[f"total_us_{name}"] = None if total is None else float(np.quantile(total, q))
        for name in PARTS:
            value = getattr(self, name)
            document[name] = None if value is None or not value.size else float(value.mean())
        return document


def step_time(
    source: Trace | Iterable[Trace],
    placement: Placement,
    cluster: Cluster,
    *,
    dispatch: Dispatch = "alltoall",
    dims: ModelDims | None = None,
    transport: Transport | None = None,
    replica_policy: ReplicaPolicy = "local",
    batch_tokens: int = 256,
    mixed_batches: bool | None = None,
    ignore_home: bool = False,
) -> StepTime:
    """Price every batch of a trace (of its first 262,144 tokens).

    Args:
        source: a trace, or its chunks in order.
        placement: where the experts are.
        cluster: with as many ranks and ranks per node as the placement.
        dispatch: the dispatch model.
        dims: of the model; default: those of the trace.
        transport: default: `Transport()`.
        replica_policy: as in `replay`.
        batch_tokens: tokens of a batch where the trace records no forward passes.
        mixed_batches: take the tokens round-robin over requests; None = only where the trace
            records no forward passes. (Consecutive tokens are mostly of one request and so of
            one home rank, whose link would be priced as if nobody else used theirs.)
        ignore_home: as in `replay`.

    Raises:
        UsageError: trace, placement and cluster do not fit together.

    Cost: O(T L K) and O(N L G).
    """
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens}, expected at least 1")
    shape = (cluster.num_ranks, cluster.ranks_per_node)
    if shape != (placement.num_ranks, placement.ranks_per_node):
        raise UsageError(
            f"the placement has {placement.num_ranks} ranks, {placement.ranks_per_node} per node; "
            f"the cluster {shape[0]}, {shape[1]} per node"
        )
    trace = _first_tokens([source] if isinstance(source, Trace) else source)
    mixed = trace.step is None if mixed_batches is None else mixed_batches
    if mixed:
        trace = interleave(trace)
    order, starts, how = _batches(trace, batch_tokens)
    if mixed:
        how = f"{batch_tokens} tokens taken round-robin over requests"
    pricing = Pricing(cluster, dims or trace.model, transport or Transport(), dispatch)
    walk = _Walk(trace, placement, dispatch, replica_policy, ignore_home, pricing.transport)
    per_batch = 40 * placement.num_layers * placement.num_ranks + walk.sent_bytes
    size = max(1, _GROUP_BYTES // per_batch)
    parts = [
        pricing.price(walk.counts(order, starts[first : first + size + 1]))
        for first in range(0, max(1, starts.size - 1), size)
    ]
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    known = {name: None if name in pricing.unknown else merged[name] for name in PARTS}
    whole: Times = np.sum([merged[name] for name in PARTS if name != "latency_us"], axis=0)
    return StepTime(
        dispatch=dispatch,
        how=how,
        num_tokens=np.diff(starts),
        total_us=None if pricing.unknown else whole,
        bottleneck_rank=merged["bottleneck_rank"].astype(np.int64),
        missing=pricing.missing,
        **known,
    )


class _Walk:
    """Counts transfers and pairs of batches of a trace."""

    def __init__(
        self,
        trace: Trace,
        placement: Placement,
        dispatch: Dispatch,
        replica_policy: ReplicaPolicy,
        ignore_home: bool,
        transport: Transport,
    ) -> None:
        self._server = Server(placement, dispatch, replica_policy)
        self._server.check(trace)
        self._trace = trace
        self._dispatch = dispatch
        self._deduplicate = transport.deduplicate_nodes
        self._home = home_ranks(trace, placement.num_ranks, ignore_home=ignore_home)
        shape = (placement.num_layers, placement.num_experts, placement.num_ranks)
        self._last = np.zeros(shape, np.int64)
        self._stamp = 1

    @property
    def sent_bytes(self) -> int:
        """Of one batch, for what home ranks have sent."""
        return self._server.nothing_sent(1).nbytes

    def counts(self, order: NDArray[np.int64], starts: NDArray[np.int64]) -> Counts:
        """Of the n batches that begin at `starts` [n + 1] in `order` [T]."""
        from placer.cost import kernels

        placement = self._server.placement
        sizes = np.diff(starts)
        n, num_layers, num_ranks = sizes.size, placement.num_layers, placement.num_ranks
        tokens = order[starts[0] : starts[-1]]
        batch = np.repeat(np.arange(n, dtype=np.int32), sizes)
        experts, weights = kernel_arrays(self._trace, tokens)
        home = self._home[tokens]
        sent = self._server.nothing_sent(n)
        turn = turns_of(self._trace, tokens)
        served = self._server.serve(experts, weights, home, turn, batch, sent)
        found = Counts(
            sizes,
            np.zeros((n, num_layers, 2, 2, num_ranks), np.int32),
            np.zeros((n, num_layers, 2, 2, num_ranks), np.int32),
            np.zeros((n, num_layers, num_ranks), np.int32),
            np.zeros((n, num_layers, num_ranks), np.int32),
        )
        if self._dispatch != "allgather":
            kernels.transfers(
                served,
                weights,
                home,
                batch,
                self._dispatch == "coherent",
                self._deduplicate,
                placement.ranks_per_node,
                found.dispatch,
                found.combine,
            )
        kernels.activate(
            experts, served, batch, found.pairs, found.activated, self._last, self._stamp
        )
        self._stamp += n
        return found


def _first_tokens(chunks: Iterable[Trace]) -> Trace:
    kept: list[Trace] = []
    room = _MAX_TOKENS
    for chunk in chunks:
        part = chunk
        if chunk.num_tokens > room:
            part = chunk.select(np.arange(chunk.num_tokens) < room)
        kept.append(part)
        room -= part.num_tokens
        if room <= 0:
            break
    if not kept:
        raise UsageError("there is nothing to price: the trace has no chunks")
    return concatenate(kept)


def _batches(trace: Trace, batch_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Tokens by batch [T], where each batch begins [N + 1], and how they were made.

    An incomplete last batch is left out when there is another.
    """
    num_tokens = trace.num_tokens
    if trace.step is not None:
        order = np.argsort(trace.step, kind="stable")
        sizes = np.unique(trace.step, return_counts=True)[1]
        return order, np.concatenate(([0], np.cumsum(sizes))), "recorded forward passes"
    num_batches = max(num_tokens // batch_tokens, min(1, num_tokens))
    starts = np.minimum(np.arange(num_batches + 1) * batch_tokens, num_tokens)
    return np.arange(num_tokens), starts, f"{batch_tokens} consecutive tokens"

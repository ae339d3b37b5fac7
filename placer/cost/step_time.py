"""Modelled step time: what a batch costs on a cluster under each dispatch model.

Everything here is modelled, from a trace, a placement, a cluster's figures and a model's
dimensions; nothing is measured. docs/cost-model.md has the formulas and an example worked by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster
from placer.cost.batching import (
    Batching,
    equal_ranks,
    equal_runs,
    micro_batches,
    recorded_passes,
)
from placer.cost.order import concatenate, interleave
from placer.cost.pipeline import makespan
from placer.cost.pricing import Priced, Pricing, Times, Transport
from placer.cost.serving import ReplicaPolicy, Server, home_ranks
from placer.cost.walking import Setting, price_batches
from placer.errors import UsageError
from placer.placement import Placement
from placer.trace.model import ModelDims, Trace
from solvers.problem import Dispatch

PARTS = ("dispatch_us", "compute_us", "combine_us", "kv_us", "latency_us", "imbalance_us")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_MAX_TOKENS = 2**18


@dataclass(frozen=True, eq=False)
class StepTime:
    """Modelled times of N batches, microseconds summed over layers (and micro-batches).

    Attributes:
        dispatch: the dispatch model.
        how: how the batches were made, in words.
        compute_by: "measured curve" or "roofline", what the experts' computation is priced by.
        micro_batches: M, 1 = communication and computation take turns.
        num_tokens: [N] tokens of each batch.
        dispatch_us, combine_us: [N] transfers to the experts and back, latency included; None
            where a dimension is missing.
        compute_us: [N] expert computation; None where a dimension is missing.
        kv_us: [N] all-gather of new KV (coherent only, else zeros); None where unknown.
        latency_us: [N] the part of all transfers that is latency.
        imbalance_us: [N] the part of the computation that a perfect balance would save.
        total_us: [N] dispatch + compute + combine + KV, less what micro-batches hide; None where
            one of them is.
        bottleneck_rank: [N] the rank that most of the known time is spent waiting for.
        rank_waits_us: [G] over all batches, time spent waiting for each rank.
        link_waits_us: [links] the same for each link.
        link_names: of every link.
        missing: dimensions that would be needed for what is None.
    """

    dispatch: Dispatch
    how: str
    compute_by: str
    micro_batches: int
    num_tokens: NDArray[np.int64]
    dispatch_us: Times | None
    compute_us: Times | None
    combine_us: Times | None
    kv_us: Times | None
    latency_us: Times | None
    imbalance_us: Times | None
    total_us: Times | None
    bottleneck_rank: NDArray[np.int64]
    rank_waits_us: Times
    link_waits_us: Times
    link_names: tuple[str, ...]
    missing: tuple[str, ...]

    def shares(self) -> dict[str, float] | None:
        """Shares of the work of all batches; None where a part is unknown or there is no batch.

        transfer: bytes on the most congested links, there and back, KV included.
        latency: of all transfers.
        compute: the experts' computation if the ranks were perfectly balanced.
        imbalance: what the busiest ranks take longer.
        hidden: what micro-batches overlap, as a share of the sum of the others (which add up to 1).
        """
        if self.total_us is None or not self.num_tokens.size:
            return None
        dispatch, compute, combine, kv, latency, imbalance = (
            float(np.sum(getattr(self, name))) for name in PARTS
        )
        work = dispatch + compute + combine + kv
        if work == 0:
            return None
        return {
            "transfer": (dispatch + combine + kv - latency) / work,
            "latency": latency / work,
            "compute": (compute - imbalance) / work,
            "imbalance": imbalance / work,
            "hidden": 1 - float(self.total_us.sum()) / work,
        }

    def summary(self) -> dict[str, Any]:
        """As JSON: mean and percentiles of the total, means of the parts, shares, bottlenecks."""
        total = self.total_us if self.total_us is not None and self.total_us.size else None
        document: dict[str, Any] = {
            "modelled": True,
            "dispatch": self.dispatch,
            "batches": self.how,
            "num_batches": int(self.num_tokens.size),
            "tokens_per_batch": float(self.num_tokens.mean()) if self.num_tokens.size else None,
            "compute_by": self.compute_by,
            "micro_batches": self.micro_batches,
            "missing": list(self.missing),
            "total_us": None if total is None else float(total.mean()),
        }
        for name, q in QUANTILES.items():
            document[f"total_us_{name}"] = None if total is None else float(np.quantile(total, q))
        for name in PARTS:
            value = getattr(self, name)
            document[name] = None if value is None or not value.size else float(value.mean())
        document["shares"] = self.shares()
        document["bottleneck"] = {
            "rank": _largest(self.rank_waits_us, [str(g) for g in range(self.rank_waits_us.size)]),
            "link": _largest(self.link_waits_us, self.link_names),
        }
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
    tokens_per_rank: int | None = None,
    mixed_batches: bool | None = None,
    num_micro_batches: int = 1,
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
        tokens_per_rank: batches of so many tokens of every home rank instead, whatever the trace
            records; tokens are taken round-robin over requests.
        mixed_batches: take the tokens round-robin over requests; None = only where the trace
            records no forward passes. (Consecutive tokens are mostly of one request and so of
            one home rank, whose link would be priced as if nobody else used theirs.)
        num_micro_batches: parts of a batch of which one communicates while another computes.
        ignore_home: as in `replay`.

    Raises:
        UsageError: trace, placement and cluster do not fit together.

    Cost: O(T L K) and O(N L G).
    """
    for name, value in (
        ("batch_tokens", batch_tokens),
        ("tokens_per_rank", tokens_per_rank),
        ("num_micro_batches", num_micro_batches),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    shape = (cluster.num_ranks, cluster.ranks_per_node)
    if shape != (placement.num_ranks, placement.ranks_per_node):
        raise UsageError(
            f"the placement has {placement.num_ranks} ranks, {placement.ranks_per_node} per node; "
            f"the cluster {shape[0]}, {shape[1]} per node"
        )
    trace = _first_tokens([source] if isinstance(source, Trace) else source)
    mixed = trace.step is None if mixed_batches is None else mixed_batches
    if mixed or tokens_per_rank is not None:
        trace = interleave(trace)
    home = home_ranks(trace, placement.num_ranks, ignore_home=ignore_home)
    batching = _batching(trace, home, placement.num_ranks, batch_tokens, tokens_per_rank, mixed)
    pricing = Pricing(cluster, dims or trace.model, transport or Transport(), dispatch, trace.top_k)
    server = Server(placement, dispatch, replica_policy)
    server.check(trace)
    setting = Setting(
        trace,
        home,
        server,
        dispatch,
        pricing.transport.deduplicate_nodes,
        cluster.ranks_per_leaf,
        pricing.links.has_pairs,
        pricing.increments,
    )
    parts = micro_batches(batching, home, num_micro_batches)
    return _assembled(
        price_batches(setting, parts, pricing), pricing, batching, dispatch, num_micro_batches
    )


def _assembled(
    priced: list[Priced],
    pricing: Pricing,
    batching: Batching,
    dispatch: Dispatch,
    num_micro_batches: int,
) -> StepTime:
    """Sums over layers and micro-batches, and the total with their overlap."""

    def joined(name: str) -> Times:
        return np.concatenate([getattr(part, name) for part in priced])

    def by_batch(values: Times) -> Times:
        return values.reshape(-1, num_micro_batches, *values.shape[1:])

    layers = {name: by_batch(joined(name)) for name in ("dispatch_us", "compute_us", "combine_us")}
    sums = {name: values.sum(axis=(1, 2)) for name, values in layers.items()}
    for name in ("kv_us", "latency_us"):
        sums[name] = by_batch(joined(name)).sum(axis=1)
    sums["imbalance_us"] = sums["compute_us"] - by_batch(joined("balanced_us")).sum(axis=(1, 2))
    if num_micro_batches == 1:
        total = sums["dispatch_us"] + sums["compute_us"] + sums["combine_us"]
    else:
        total = makespan(layers["dispatch_us"], layers["compute_us"], layers["combine_us"])
    rank_waits = by_batch(joined("rank_waits")).sum(axis=1)
    unknown = pricing.unknown | ({"imbalance_us"} if "compute_us" in pricing.unknown else set())
    known = {name: None if name in unknown else sums[name] for name in PARTS}
    return StepTime(
        dispatch=dispatch,
        how=batching.how,
        compute_by="measured curve" if pricing.increments.size else "roofline",
        micro_batches=num_micro_batches,
        num_tokens=np.diff(batching.starts),
        total_us=None if pricing.unknown else total + sums["kv_us"],
        bottleneck_rank=rank_waits.argmax(axis=1).astype(np.int64),
        rank_waits_us=rank_waits.sum(axis=0),
        link_waits_us=joined("link_waits").sum(axis=0),
        link_names=pricing.links.names,
        missing=pricing.missing,
        **known,
    )


def _batching(
    trace: Trace,
    home: NDArray[np.int32],
    num_ranks: int,
    batch_tokens: int,
    tokens_per_rank: int | None,
    mixed: bool,
) -> Batching:
    if tokens_per_rank is not None:
        return equal_ranks(home, num_ranks, tokens_per_rank)
    if mixed:
        return equal_runs(trace, batch_tokens, "tokens taken round-robin over requests")
    if trace.step is not None:
        return recorded_passes(trace)
    return equal_runs(trace, batch_tokens, "consecutive tokens")


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


def _largest(waits: Times, names: tuple[str, ...] | list[str]) -> dict[str, Any] | None:
    """The name that is waited for longest, and its share of all waiting; None if nothing is."""
    whole = float(waits.sum())
    if whole == 0:
        return None
    index = int(waits.argmax())
    return {"name": names[index], "share": float(waits[index]) / whole}

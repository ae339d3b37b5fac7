"""The prices of the step-time model: microseconds of counted transfers and computations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster
from placer.cost.compute import compute_time, curve_increments
from placer.cost.links import Links
from placer.trace.model import ModelDims
from solvers.problem import Dispatch

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Transport:
    """How hidden states travel.

    Attributes:
        deduplicate_nodes: send one copy per remote node over the network, then fan out.
        dispatch_element_bytes, combine_element_bytes: bytes of one element of a hidden state.
        kv_bytes_per_token: keys and values of one token over all layers (coherent); None =
            unknown.
    """

    deduplicate_nodes: bool = False
    dispatch_element_bytes: float = 2
    combine_element_bytes: float = 2
    kv_bytes_per_token: float | None = None


@dataclass(frozen=True, eq=False)
class Counts:
    """What n batches send and compute.

    Attributes:
        tokens: [n].
        dispatch, combine: [n, L, link, direction, G] hidden states; see
            `transfer_kernels.transfers`.
        pairs_of_ranks: [n, L, way, G, G] hidden states from rank to rank, on dispatch and combine;
            [0, ...] where nobody asked.
        pairs: [n, L, G] token-expert pairs.
        activated: [n, L, G] distinct experts used.
        curve_us: [n, L, G] sum over experts of their measured times; [0, ...] without a curve.
    """

    tokens: NDArray[np.int64]
    dispatch: NDArray[np.int32]
    combine: NDArray[np.int32]
    pairs_of_ranks: NDArray[np.int32]
    pairs: NDArray[np.int32]
    activated: NDArray[np.int32]
    curve_us: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Priced:
    """Microseconds of n batches; zeros where a part is unknown.

    Attributes:
        dispatch_us, combine_us: [n, L] transfers, latency included.
        compute_us: [n, L] computation, until the last rank is done.
        balanced_us: [n, L] the same if every rank had the mean work.
        latency_us: [n] the part of all transfers that is latency.
        kv_us: [n] all-gather of new keys and values.
        rank_waits: [n, G] time spent waiting for each rank: for its computation, or its links.
        link_waits: [n, links] time spent waiting for each link.
    """

    dispatch_us: Times
    combine_us: Times
    compute_us: Times
    balanced_us: Times
    latency_us: Times
    kv_us: Times
    rank_waits: Times
    link_waits: Times


class Pricing:
    """Microseconds of counts.

    Attributes:
        transport: how hidden states travel.
        links: all links, by number.
        increments: what each further pair of an expert takes, where that was measured.
        missing: dimensions that are needed and unknown.
        unknown: parts that cannot be priced without them.
    """

    def __init__(
        self,
        cluster: Cluster,
        dims: ModelDims,
        transport: Transport,
        dispatch: Dispatch,
        top_k: int,
    ) -> None:
        self.transport = transport
        self.links = Links(cluster)
        self._cluster = cluster
        self._dims = dims
        self._dispatch = dispatch
        self._top_k = top_k
        transfers = ("dispatch_us", "combine_us", "latency_us")
        needs = {
            "hidden_size": (dims.hidden_size, transfers),
            "expert_bytes": (dims.expert_bytes, ("compute_us",)),
            "expert_flops_per_token": (dims.expert_flops_per_token, ("compute_us",)),
            "cluster hbm_gbps": (cluster.of_ranks("hbm_gbps"), ("compute_us",)),
            "cluster flops": (cluster.of_ranks("flops"), ("compute_us",)),
        }
        self.increments = curve_increments(cluster, dims)
        if self.increments.size:  # measured: no figure of the roofline is needed
            for name in ("expert_flops_per_token", "cluster hbm_gbps", "cluster flops"):
                del needs[name]
        if dispatch == "coherent":
            needs["kv_bytes_per_token"] = (transport.kv_bytes_per_token, ("kv_us", "latency_us"))
        self.missing = tuple(name for name, (value, _) in needs.items() if value is None)
        self.unknown = {part for name in self.missing for part in needs[name][1]}

    def _collective_us(self, way: int) -> float:
        """Latency of a dispatch (way 0) or combine (1); coherent top-1 has no combine."""
        if way == 1 and self._dispatch == "coherent" and self._top_k == 1:
            return 0.0
        return self.links.latency_us(in_turn=self.transport.deduplicate_nodes)

    def price(self, counts: Counts) -> Priced:
        """What these batches cost."""
        n, num_layers, num_ranks = counts.pairs.shape
        tokens = counts.tokens.astype(np.float64)
        rank_waits = np.zeros((n, num_ranks))
        link_waits = np.zeros((n, len(self.links.names)))
        rows = np.arange(n)[:, None]
        latency_us = np.zeros(n)
        moved: list[Times] = []
        for way, (states, element_bytes) in enumerate(
            (
                (counts.dispatch, self.transport.dispatch_element_bytes),
                (counts.combine, self.transport.combine_element_bytes),
            )
        ):
            if "dispatch_us" in self.unknown:
                moved.append(np.zeros((n, num_layers)))
                continue
            state_bytes = float(self._dims.hidden_size or 0) * element_bytes
            if self._dispatch == "allgather":
                wire, latency, link = self.links.all_gather(tokens * state_bytes)
                moved.append(np.repeat((wire + latency)[:, None], num_layers, axis=1))
                latency_us += latency * num_layers
                link_waits[:, link] += wire * num_layers
                continue
            asked = counts.pairs_of_ranks
            pairs = asked[:, :, way] if self.links.has_pairs else None
            found = self.links.transfer(states, pairs, state_bytes)
            latency = np.where(tokens > 0, self._collective_us(way), 0.0)
            moved.append(found.wire_us + latency[:, None])
            latency_us += latency * num_layers
            np.add.at(link_waits, (rows, found.link), found.wire_us)
        is_owned = self.links.rank_of >= 0
        np.add.at(rank_waits.T, self.links.rank_of[is_owned], link_waits.T[is_owned])
        compute_us = balanced_us = np.zeros((n, num_layers))
        if "compute_us" not in self.unknown:
            computed = compute_time(
                self._cluster, self._dims, counts.pairs, counts.activated, counts.curve_us
            )
            compute_us, balanced_us = computed.time_us, computed.balanced_us
            np.add.at(rank_waits, (rows, computed.rank), computed.time_us)
        kv_us = np.zeros(n)
        if self._dispatch == "coherent" and "kv_us" not in self.unknown:
            kv_bytes = float(self.transport.kv_bytes_per_token or 0)
            wire, latency, link = self.links.all_gather(tokens * kv_bytes)
            kv_us = wire + latency
            latency_us = latency_us + latency
            link_waits[:, link] += wire
        return Priced(
            moved[0], moved[1], compute_us, balanced_us, latency_us, kv_us, rank_waits, link_waits
        )

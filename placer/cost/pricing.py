"""The prices of the step-time model: microseconds of counted transfers and computations.

Bandwidths in GB/s are 10^3 bytes per microsecond. Formulas in docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster
from placer.trace.model import ModelDims
from solvers.problem import Dispatch

Times = NDArray[np.float64]
PARTS = ("dispatch_us", "compute_us", "combine_us", "kv_us", "latency_us")


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
        dispatch, combine: [n, L, link, direction, G] hidden states; see `kernels.transfers`.
        pairs: [n, L, G] token-expert pairs.
        activated: [n, L, G] distinct experts used.
    """

    tokens: NDArray[np.int64]
    dispatch: NDArray[np.int32]
    combine: NDArray[np.int32]
    pairs: NDArray[np.int32]
    activated: NDArray[np.int32]


class Pricing:
    """Microseconds of counts.

    Attributes:
        transport: how hidden states travel.
        missing: dimensions that are needed and unknown.
        unknown: parts that cannot be priced without them.
    """

    def __init__(
        self, cluster: Cluster, dims: ModelDims, transport: Transport, dispatch: Dispatch
    ) -> None:
        self.transport = transport
        self._cluster = cluster
        self._dims = dims
        self._dispatch = dispatch
        transfers = ("dispatch_us", "combine_us", "latency_us")
        needs = {
            "hidden_size": (dims.hidden_size, transfers),
            "expert_bytes": (dims.expert_bytes, ("compute_us",)),
            "expert_flops_per_token": (dims.expert_flops_per_token, ("compute_us",)),
            "cluster hbm_gbps": (cluster.hbm_gbps, ("compute_us",)),
            "cluster flops": (cluster.flops, ("compute_us",)),
        }
        if dispatch == "coherent":
            needs["kv_bytes_per_token"] = (transport.kv_bytes_per_token, ("kv_us", "latency_us"))
        self.missing = tuple(name for name, (value, _) in needs.items() if value is None)
        self.unknown = {part for name in self.missing for part in needs[name][1]}

    def price(self, counts: Counts) -> dict[str, NDArray[Any]]:
        """Part -> [n] microseconds (zeros where unknown), and the bottleneck rank [n]."""
        n, num_layers, num_ranks = counts.pairs.shape
        tokens = counts.tokens.astype(np.float64)
        waited = np.zeros((n, num_ranks))
        parts = dict.fromkeys(PARTS, np.zeros(n))
        if "dispatch_us" not in self.unknown:
            for part, states, element_bytes in (
                ("dispatch_us", counts.dispatch, self.transport.dispatch_element_bytes),
                ("combine_us", counts.combine, self.transport.combine_element_bytes),
            ):
                state_bytes = float(self._dims.hidden_size or 0) * element_bytes
                if self._dispatch == "allgather":
                    wire, latency = self._all_gather(tokens * state_bytes)
                    wire, latency = wire * num_layers, latency * num_layers
                else:
                    wire, latency = self._transfer(states.astype(np.float64) * state_bytes, waited)
                parts[part] = wire + latency
                parts["latency_us"] = parts["latency_us"] + latency
        if "compute_us" not in self.unknown:
            parts["compute_us"] = self._compute(counts, waited)
        if self._dispatch == "coherent" and "kv_us" not in self.unknown:
            kv_bytes = float(self.transport.kv_bytes_per_token or 0)
            wire, latency = self._all_gather(tokens * kv_bytes)
            parts["kv_us"] = wire + latency
            parts["latency_us"] = parts["latency_us"] + latency
        return {**parts, "bottleneck_rank": waited.argmax(axis=1)}

    def _transfer(self, moved_bytes: Times, waited: Times) -> tuple[Times, Times]:
        """Wire and latency time [n], summed over layers, of bytes [n, L, link, direction, G]."""
        cluster = self._cluster
        moved = moved_bytes.copy()
        if cluster.inter_node_scope == "node":
            network = moved[:, :, 1].reshape(*moved.shape[:2], 2, -1, cluster.ranks_per_node)
            moved[:, :, 1] = np.repeat(network.sum(axis=-1), cluster.ranks_per_node, axis=-1)
        rates = np.array([cluster.intra_node_gbps, cluster.inter_node_gbps]) * 1e3
        per_rank = (moved.max(axis=3) / rates[:, None]).max(axis=2)
        wire = self._slowest(per_rank, waited)
        used = moved.max(axis=(3, 4)) > 0
        intra = np.where(used[:, :, 0], cluster.intra_node_latency_us, 0.0)
        inter = np.where(used[:, :, 1], cluster.inter_node_latency_us, 0.0)
        # With de-duplication the fan-out follows the network; without, both go at once.
        latency = intra + inter if self.transport.deduplicate_nodes else np.maximum(intra, inter)
        return wire, latency.sum(axis=1)

    def _all_gather(self, total_bytes: Times) -> tuple[Times, Times]:
        """Wire and latency time [n] of bringing `total_bytes` [n], spread evenly, to all ranks.

        Every rank fetches its share of the other nodes' bytes over the network, and the rest of
        what it lacks from its own node.
        """
        cluster = self._cluster
        network = total_bytes * (1 - 1 / cluster.num_nodes) / cluster.ranks_per_node
        fast = total_bytes * (1 - 1 / cluster.num_ranks) - network
        sharers = cluster.ranks_per_node if cluster.inter_node_scope == "node" else 1
        wire = np.maximum(
            network * sharers / (cluster.inter_node_gbps * 1e3),
            fast / (cluster.intra_node_gbps * 1e3),
        )
        latency = cluster.intra_node_latency_us * (cluster.ranks_per_node > 1)
        latency += cluster.inter_node_latency_us * (cluster.num_nodes > 1)
        return wire, np.where(total_bytes > 0, latency, 0.0)

    def _compute(self, counts: Counts, waited: Times) -> Times:
        """Roofline time [n], summed over layers, of the busiest rank of each layer."""
        flop_us = float(self._dims.expert_flops_per_token or 0) / float(self._cluster.flops or 1)
        read_us = float(self._dims.expert_bytes or 0) / (float(self._cluster.hbm_gbps or 1) * 1e3)
        per_rank = np.maximum(counts.pairs * (flop_us * 1e6), counts.activated * read_us)
        return self._slowest(per_rank, waited)

    def _slowest(self, per_rank: Times, waited: Times) -> Times:
        """[n] sum over layers of the slowest rank's time, also added to its `waited` [n, G]."""
        peak = per_rank.max(axis=2)
        np.add.at(waited, (np.arange(peak.shape[0])[:, None], per_rank.argmax(axis=2)), peak)
        total: Times = peak.sum(axis=1)
        return total

"""From bytes on links to microseconds: rank links, node buses, leaf uplinks, measured pairs.

A collective takes its latency, whether or not a rank has anything to send (it waits for every rank
to say so), plus what its most congested link takes. Bandwidths in GB/s are 10^3
bytes per microsecond. Formulas in docs/cost-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster

Times = NDArray[np.float64]
_DIRECTIONS = ("send", "receive")


@dataclass(frozen=True, eq=False)
class Transferred:
    """Transfers of n batches in L layers.

    Attributes:
        wire_us: [n, L] what the most congested link takes.
        link: [n, L] number of the most congested link, an index of `Links.names`.
    """

    wire_us: Times
    link: NDArray[np.intp]


class Links:
    """All links of a cluster, numbered.

    Attributes:
        names: of every link, e.g. "rank 3 network receive".
        rank_of: [links] the rank that a link belongs to, -1 where several share it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        num_ranks, num_nodes = cluster.num_ranks, cluster.num_nodes
        per_node, per_leaf = cluster.ranks_per_node, cluster.ranks_per_leaf
        self.has_pairs = cluster.pair_gbps is not None
        names: list[str] = []
        rank_of: list[int] = []

        def add(kind: str, owners: str, count: int, directions: tuple[str, ...]) -> None:
            for direction in directions:
                names.extend(f"{owners} {i} {kind} {direction}".strip() for i in range(count))
                rank_of.extend(range(count) if owners == "rank" else [-1] * count)

        self._network_by_node = cluster.inter_node_scope == "node" and not self.has_pairs
        if self.has_pairs:
            add("port", "rank", num_ranks, _DIRECTIONS)
        else:
            add("fast link", "rank", num_ranks, _DIRECTIONS)
            if self._network_by_node:
                add("network", "node", num_nodes, _DIRECTIONS)
            else:
                add("network", "rank", num_ranks, _DIRECTIONS)
        self._has_copies = cluster.same_rank_gbps is not None
        if self._has_copies:
            add("copies", "rank", num_ranks, ("",))
        self._has_bus = cluster.intra_node_shared_gbps is not None
        if self._has_bus:
            add("bus", "node", num_nodes, ("",))
        self._has_leaves = cluster.network is not None and cluster.num_leaves > 1
        if self._has_leaves:
            add("uplink", "leaf", cluster.num_leaves, _DIRECTIONS)
        self.names = tuple(names)
        self.rank_of = np.array(rank_of, np.int64)

        intra = cluster.of_ranks("intra_node_gbps")
        inter = cluster.of_ranks("inter_node_gbps")
        assert intra is not None
        assert inter is not None
        self._intra_us, self._inter_us = 1 / (intra * 1e3), 1 / (inter * 1e3)  # [G] per byte
        of_nodes = inter.reshape(num_nodes, per_node)
        self._node_gbps = of_nodes[:, 0] if self._network_by_node else of_nodes.sum(axis=1)
        self._leaf_of_node = np.arange(num_nodes) * per_node // per_leaf
        if self.has_pairs:
            pair_gbps = np.array(cluster.pair_gbps, np.float64)
            np.fill_diagonal(pair_gbps, np.inf)
            self._pair_us = 1 / (pair_gbps * 1e3)
            self._pair_latency_us = np.array(cluster.pair_latency_us, np.float64)
            np.fill_diagonal(self._pair_latency_us, 0.0)
            node = np.arange(num_ranks) // per_node
            self._is_near = node[:, None] == node

    def transfer(
        self,
        states: NDArray[np.int32],
        pairs: NDArray[np.int32] | None,
        state_bytes: float,
    ) -> Transferred:
        """Price hidden states that move.

        Args:
            states: [n, L, link, direction, G] moved; see `transfer_kernels.transfers`.
            pairs: [n, L, G, G] the same by sender and receiver; needed with measured pairs.
            state_bytes: of one hidden state.
        """
        n, num_layers = states.shape[:2]
        cluster = self._cluster
        num_nodes, per_node = cluster.num_nodes, cluster.ranks_per_node
        columns: list[Times] = []
        if self.has_pairs:
            assert pairs is not None
            busy = pairs * (self._pair_us * state_bytes)
            columns += [busy.sum(axis=3), busy.sum(axis=2)]
        else:
            fast = states[:, :, 0] * (self._intra_us * state_bytes)
            columns += [fast[:, :, 0], fast[:, :, 1]]
            if self._network_by_node:
                sums = states[:, :, 1].reshape(n, num_layers, 2, num_nodes, per_node).sum(axis=4)
                far = sums * (state_bytes / (self._node_gbps * 1e3))
            else:
                far = states[:, :, 1] * (self._inter_us * state_bytes)
            columns += [far[:, :, 0], far[:, :, 1]]
        if self._has_copies:
            kept = states[:, :, 3, 0].astype(np.float64)
            columns.append(kept * (state_bytes * self._copy_us))
        if self._has_bus:
            sent = states[:, :, 0, 0].reshape(n, num_layers, num_nodes, per_node).sum(axis=3)
            columns.append(sent * (state_bytes * self._bus_us))
        if self._has_leaves:
            starts = np.arange(cluster.num_leaves) * cluster.ranks_per_leaf
            crossing = np.add.reduceat(states[:, :, 2], starts, axis=3)
            up = crossing * (state_bytes * self._uplink_us)
            columns += [up[:, :, 0], up[:, :, 1]]
        times = np.concatenate(columns, axis=2)
        return Transferred(times.max(axis=2), times.argmax(axis=2))

    def all_gather(self, total_bytes: Times) -> tuple[Times, Times, int]:
        """Wire and latency [n] of bringing `total_bytes` [n], spread evenly, to all ranks.

        Every rank fetches its share of the other nodes' bytes over the network, and the rest of
        what it lacks from its own node; with measured pairs, each rank's share from that rank.
        Also the number of the busiest link.
        """
        cluster = self._cluster
        num_ranks, num_nodes, per_node = (
            cluster.num_ranks,
            cluster.num_nodes,
            cluster.ranks_per_node,
        )
        network = (1 - 1 / num_nodes) / per_node  # shares of the total that one rank fetches
        fast = (1 - 1 / num_ranks) - network
        columns: list[Times] = []
        if self.has_pairs:
            columns += [self._pair_us.sum(axis=i) / num_ranks for i in (1, 0)]
        else:
            columns += [fast * self._intra_us] * 2
            if self._network_by_node:
                columns += [network * per_node / (self._node_gbps * 1e3)] * 2
            else:
                columns += [network * self._inter_us] * 2
        if self._has_copies:
            columns.append(np.full(num_ranks, self._copy_us / num_ranks))
        if self._has_bus:
            columns.append(np.full(num_nodes, fast * per_node * self._bus_us))
        if self._has_leaves:
            nodes = np.bincount(self._leaf_of_node)
            columns += [nodes * (1 - nodes / num_nodes) * self._uplink_us] * 2
        per_byte = np.concatenate(columns)
        latency = self.latency_us(in_turn=True)
        busiest = int(per_byte.argmax())
        return total_bytes * per_byte[busiest], np.where(total_bytes > 0, latency, 0.0), busiest

    @property
    def _bus_us(self) -> float:
        """Microseconds of a byte on a node's bus."""
        return 1 / (float(self._cluster.intra_node_shared_gbps or 1) * 1e3)

    @property
    def _copy_us(self) -> float:
        """Microseconds of a byte that a rank keeps."""
        return 1 / (float(self._cluster.same_rank_gbps or 1) * 1e3)

    @property
    def _uplink_us(self) -> Times:
        """[leaves] microseconds of a byte on a leaf's links to the spine."""
        network = self._cluster.network
        assert network is not None
        below: Times = np.bincount(self._leaf_of_node, weights=self._node_gbps).astype(np.float64)
        return network.oversubscription / (below * 1e3)

    def latency_us(self, *, in_turn: bool) -> float:
        """Of one collective among all ranks.

        Args:
            in_turn: what moves inside nodes waits for what comes over the network (node-level
                copies, all-gathers); else both go at once.
        """
        cluster = self._cluster
        if cluster.num_ranks == 1:
            return 0.0
        if self.has_pairs:
            near = float(np.where(self._is_near, self._pair_latency_us, 0.0).max())
            far = float(np.where(self._is_near, 0.0, self._pair_latency_us).max())
        else:
            near = cluster.intra_node_latency_us * (cluster.ranks_per_node > 1)
            far = cluster.inter_node_latency_us * (cluster.num_nodes > 1)
        if self._has_leaves and cluster.network is not None:
            far += cluster.network.spine_latency_us
        latency = near + far if in_turn else max(near, far)
        return latency + cluster.peer_latency_us * (cluster.num_ranks - 1)

"""The `Cluster` dataclass: what nodes, ranks, links and devices can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError

NetworkScope = Literal["rank", "node"]
PER_RANK = ("memory_bytes", "hbm_gbps", "flops", "intra_node_gbps", "inter_node_gbps")


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """Figures of some ranks that differ from those of the cluster; None = the cluster's.

    Attributes:
        ranks: which ranks.
        memory_bytes, hbm_gbps, flops, intra_node_gbps, inter_node_gbps: as in `Cluster`.
    """

    ranks: tuple[int, ...]
    memory_bytes: int | None = None
    hbm_gbps: float | None = None
    flops: float | None = None
    intra_node_gbps: float | None = None
    inter_node_gbps: float | None = None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A leaf-spine network: nodes hang on leaves, leaves on a spine.

    Attributes:
        nodes_per_leaf: nodes below one leaf (a rack, a rail group, a pod).
        oversubscription: bandwidth of a leaf's nodes / that of its links to the spine; 1 = none.
        spine_latency_us: what a transfer between leaves takes longer than one below a leaf.
    """

    nodes_per_leaf: int
    oversubscription: float = 1.0
    spine_latency_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes x ranks with their links and devices.

    Bandwidths are in GB/s (10^9 bytes per second), in one direction; links are full duplex.
    docs/cluster.md says what each figure is for, docs/cost-model.md how it is used.

    Attributes:
        name: of the preset or file.
        num_nodes: N.
        ranks_per_node: ranks that share fast links.
        intra_node_gbps: what one rank can send (and receive) over its fast links.
        intra_node_latency_us: of one transfer over them, launch included.
        inter_node_gbps: what one rank, or one node, can send (and receive) over the network.
        inter_node_scope: whether `inter_node_gbps` belongs to each `rank` or is shared by a
            whole `node`.
        inter_node_latency_us: of one transfer over the network, launch included.
        peer_latency_us: what each further rank of the group adds to the latency of a collective.
        intra_node_shared_gbps: what all ranks of a node together can send among themselves, where
            they share a bus or a host's memory; None = their links alone limit them.
        same_rank_gbps: at which a rank copies what stays on it into and out of its batches; None =
            at no cost.
        network: leaves and spine; None = any two nodes are equally near.
        memory_bytes: memory of one rank's device; None = unknown.
        hbm_gbps: bandwidth of that memory; None = unknown.
        flops: floating-point operations per second of one rank; None = unknown.
        compute_latency_us: fixed cost of the experts' computation in one layer, on a rank that
            serves any pair.
        expert_latency_us: fixed cost of each expert that a rank uses in a layer.
        compute_overlap: share of the shorter of reading weights and computing that hides behind the
            longer; 1 = the roofline.
        curve_pairs, curve_us: time of one expert by the number of its pairs, measured; linear
            between these points, and on beyond the last. In place of the roofline for experts of
            `curve_expert_bytes`.
        curve_expert_bytes: size of the experts whose curve that is.
        ranks_at_full_speed: how many ranks of a node can compute at once at these figures, where
            they share a host's cores; None = all of them.
        rank_figures: ranks that are unlike the others.
        pair_gbps, pair_latency_us: G x G, what rank i can send to rank j; measured. Where given,
            they stand in for the links of ranks.
        source: where the figures come from.
    """

    name: str
    num_nodes: int
    ranks_per_node: int
    intra_node_gbps: float
    intra_node_latency_us: float
    inter_node_gbps: float
    inter_node_latency_us: float
    inter_node_scope: NetworkScope = "rank"
    peer_latency_us: float = 0.0
    intra_node_shared_gbps: float | None = None
    same_rank_gbps: float | None = None
    network: Network | None = None
    memory_bytes: int | None = None
    hbm_gbps: float | None = None
    flops: float | None = None
    compute_latency_us: float = 0.0
    expert_latency_us: float = 0.0
    compute_overlap: float = 1.0
    curve_pairs: tuple[int, ...] = ()
    curve_us: tuple[float, ...] = ()
    curve_expert_bytes: int | None = None
    ranks_at_full_speed: float | None = None
    rank_figures: tuple[RankFigures, ...] = ()
    pair_gbps: tuple[tuple[float, ...], ...] | None = None
    pair_latency_us: tuple[tuple[float, ...], ...] | None = None
    source: str = ""

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_leaves(self) -> int:
        """Leaves of the network; 1 where there are none."""
        return -(-self.num_nodes // self.network.nodes_per_leaf) if self.network else 1

    @property
    def ranks_per_leaf(self) -> int:
        """Ranks below one leaf; all of them where there are no leaves."""
        per_leaf = self.network.nodes_per_leaf if self.network else self.num_nodes
        return min(per_leaf, self.num_nodes) * self.ranks_per_node

    @property
    def is_fixed(self) -> bool:
        """Whether figures of single ranks tie the cluster to its own number of ranks."""
        return bool(self.rank_figures) or self.pair_gbps is not None

    def of_ranks(self, name: str) -> NDArray[np.float64] | None:
        """[G] a figure of every rank, or None where it is unknown for any.

        Args:
            name: one of memory_bytes, hbm_gbps, flops, intra_node_gbps, inter_node_gbps.
        """
        common = getattr(self, name)
        found = np.full(self.num_ranks, np.nan if common is None else float(common))
        for figures in self.rank_figures:
            own = getattr(figures, name)
            if own is not None:
                found[list(figures.ranks)] = float(own)
        return None if np.isnan(found).any() else found

    def cut(self, num_nodes: int | None, ranks_per_node: int | None) -> Cluster:
        """The same nodes and ranks in other numbers.

        Raises:
            UsageError: a node has fewer ranks, or single ranks have figures of their own.
        """
        nodes = self.num_nodes if num_nodes is None else num_nodes
        ranks = self.ranks_per_node if ranks_per_node is None else ranks_per_node
        if (nodes, ranks) == (self.num_nodes, self.ranks_per_node):
            return self
        if self.is_fixed:
            raise UsageError(
                f"cluster {self.name} describes its {self.num_nodes} nodes x "
                f"{self.ranks_per_node} ranks one by one; {nodes} x {ranks} were asked for",
                "ask for the same numbers, or describe the other cluster in a file of its own",
            )
        if ranks > self.ranks_per_node and self.name != "local-cpu":
            raise UsageError(
                f"a node of {self.name} has {self.ranks_per_node} ranks, not {ranks}",
                "use more nodes, or describe your cluster in a TOML file",
            )
        return replace(self, num_nodes=nodes, ranks_per_node=ranks)

    def __post_init__(self) -> None:
        if min(self.num_nodes, self.ranks_per_node) < 1:
            raise UsageError("num_nodes and ranks_per_node must be at least 1")
        for name in (*PER_RANK, "intra_node_shared_gbps", "same_rank_gbps", "ranks_at_full_speed"):
            _check_positive(name, getattr(self, name))
        for name in (
            "intra_node_latency_us",
            "inter_node_latency_us",
            "peer_latency_us",
            "compute_latency_us",
            "expert_latency_us",
        ):
            _check_latency(name, getattr(self, name))
        if not 0 <= self.compute_overlap <= 1:
            raise UsageError(f"compute_overlap is {self.compute_overlap}, expected 0 to 1")
        if self.inter_node_scope not in get_args(NetworkScope):
            raise UsageError(
                f"inter_node_scope is {self.inter_node_scope!r}, expected rank or node"
            )
        if self.network is not None:
            if self.network.nodes_per_leaf < 1:
                raise UsageError(
                    f"nodes_per_leaf is {self.network.nodes_per_leaf}, expected 1 or more"
                )
            _check_positive("oversubscription", self.network.oversubscription)
            _check_latency("spine_latency_us", self.network.spine_latency_us)
        self._check_curve()
        self._check_single_ranks()

    def _check_curve(self) -> None:
        pairs, times = self.curve_pairs, self.curve_us
        if len(pairs) != len(times):
            raise UsageError(
                f"curve_pairs has {len(pairs)} points, curve_us {len(times)}; expected the same"
            )
        rises = all(a < b for a, b in zip((0, *pairs), pairs, strict=False))
        if not rises or not all(a <= b for a, b in zip((0.0, *times), times, strict=False)):
            raise UsageError("curve_pairs must increase from 1 or more, curve_us not decrease")
        if bool(pairs) != (self.curve_expert_bytes is not None):
            raise UsageError("curve_pairs and curve_expert_bytes go together; one is missing")

    def _check_single_ranks(self) -> None:
        seen: set[int] = set()
        for figures in self.rank_figures:
            for rank in figures.ranks:
                if not 0 <= rank < self.num_ranks:
                    raise UsageError(
                        f"rank_figures name rank {rank}, the cluster has {self.num_ranks} ranks"
                    )
                if rank in seen:
                    raise UsageError(f"rank_figures name rank {rank} twice")
                seen.add(rank)
            for name in PER_RANK:
                _check_positive(name, getattr(figures, name))
        if self.inter_node_scope == "node" and any(
            figures.inter_node_gbps is not None for figures in self.rank_figures
        ):
            raise UsageError("inter_node_gbps of single ranks needs inter_node_scope = rank")
        if (self.pair_gbps is None) != (self.pair_latency_us is None):
            raise UsageError("pair_gbps and pair_latency_us go together; one is missing")
        for name in ("pair_gbps", "pair_latency_us"):
            table = getattr(self, name)
            if table is None:
                continue
            widths = {len(row) for row in table}
            if len(table) != self.num_ranks or widths != {self.num_ranks}:
                raise UsageError(
                    f"{name} must have {self.num_ranks} rows of {self.num_ranks} numbers"
                )
            for i, row in enumerate(table):
                for j, value in enumerate(row):
                    if i != j:
                        check = _check_positive if name == "pair_gbps" else _check_latency
                        check(f"{name}[{i}][{j}]", value)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UsageError(f"{name} is {value}, expected a positive number")


def _check_latency(name: str, value: float) -> None:
    if not value >= 0:
        raise UsageError(f"{name} is {value}, expected 0 or more")

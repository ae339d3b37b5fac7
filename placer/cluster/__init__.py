"""`Cluster`: ranks, nodes, links and devices that a plan is made for (docs/cluster.md)."""

from placer.cluster.files import read_cluster, write_cluster
from placer.cluster.memory import fits
from placer.cluster.model import Cluster, Network, NetworkScope, RankFigures
from placer.cluster.presets import PRESETS, load_cluster

__all__ = [
    "PRESETS",
    "Cluster",
    "Network",
    "NetworkScope",
    "RankFigures",
    "fits",
    "load_cluster",
    "read_cluster",
    "write_cluster",
]

"""Clusters by name: figures of datasheets, with their sources, and assumed latencies."""

from __future__ import annotations

from pathlib import Path

from placer.cluster.files import read_cluster
from placer.cluster.model import Cluster, Network
from placer.errors import UsageError
from placer.wording import among

_ASSUMED = "latencies are assumed (no datasheet gives them): measure yours"


def _gpu_node(
    name: str,
    source: str,
    *,
    ranks: int = 8,
    intra_node_gbps: float,
    inter_node_gbps: float,
    memory_gb: int,
    hbm_gbps: float,
    teraflops: float,
    network: Network | None = None,
) -> Cluster:
    return Cluster(
        name=name,
        num_nodes=1,
        ranks_per_node=ranks,
        intra_node_gbps=intra_node_gbps,
        intra_node_latency_us=5.0,
        inter_node_gbps=inter_node_gbps,
        inter_node_latency_us=15.0,
        network=network,
        memory_bytes=memory_gb * 10**9,
        hbm_gbps=hbm_gbps,
        flops=teraflops * 1e12,
        source=f"{source}; {_ASSUMED}",
    )


# Link figures of datasheets count both directions together: halved here. FLOPs: dense BF16.
PRESETS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        _gpu_node(
            "a100-nvl8",
            "NVIDIA A100 80GB SXM datasheet (2.039 TB/s, 312 TFLOPS, NVLink 600 GB/s), "
            "DGX A100: one 200 Gb/s InfiniBand HDR ConnectX-6 per GPU",
            intra_node_gbps=300.0,
            inter_node_gbps=25.0,
            memory_gb=80,
            hbm_gbps=2039.0,
            teraflops=312.0,
        ),
        _gpu_node(
            "h800-nvl8",
            "H100 SXM silicon (80 GB, 3.35 TB/s, 989 TFLOPS dense) with NVLink of 400 GB/s; one "
            "400 Gb/s InfiniBand ConnectX-7 per GPU, as in DeepSeek's DeepEP (README)",
            intra_node_gbps=200.0,
            inter_node_gbps=50.0,
            memory_gb=80,
            hbm_gbps=3350.0,
            teraflops=989.0,
        ),
        _gpu_node(
            "h100-nvl8",
            "NVIDIA H100 SXM datasheet (80 GB, 3.35 TB/s, 989 TFLOPS dense, NVLink 900 GB/s), "
            "DGX H100: one 400 Gb/s InfiniBand NDR ConnectX-7 per GPU, non-blocking",
            intra_node_gbps=450.0,
            inter_node_gbps=50.0,
            memory_gb=80,
            hbm_gbps=3350.0,
            teraflops=989.0,
        ),
        _gpu_node(
            "h100-nvl8-roce",
            "as h100-nvl8, one 400 Gb/s RoCE port per GPU; 384 nodes (3,072 GPUs) below one "
            "non-blocking zone and 7:1 oversubscribed above it, as in Gangidi et al., RDMA over "
            "Ethernet for Distributed AI Training at Meta Scale, SIGCOMM 2024",
            intra_node_gbps=450.0,
            inter_node_gbps=50.0,
            memory_gb=80,
            hbm_gbps=3350.0,
            teraflops=989.0,
            network=Network(nodes_per_leaf=384, oversubscription=7.0, spine_latency_us=5.0),
        ),
        _gpu_node(
            "h200-nvl8",
            "NVIDIA H200 SXM datasheet (141 GB, 4.8 TB/s, 989 TFLOPS dense, NVLink 900 GB/s), "
            "DGX H200: one 400 Gb/s InfiniBand NDR ConnectX-7 per GPU, non-blocking",
            intra_node_gbps=450.0,
            inter_node_gbps=50.0,
            memory_gb=141,
            hbm_gbps=4800.0,
            teraflops=989.0,
        ),
        _gpu_node(
            "b200-nvl8",
            "NVIDIA DGX B200 datasheet (8 GPUs: 1,440 GB, 64 TB/s, 72 PFLOPS sparse FP8 = 18 "
            "dense BF16, NVLink 14.4 TB/s), one 400 Gb/s InfiniBand ConnectX-7 per GPU",
            intra_node_gbps=900.0,
            inter_node_gbps=50.0,
            memory_gb=180,
            hbm_gbps=8000.0,
            teraflops=2250.0,
        ),
        _gpu_node(
            "gb200-nvl72",
            "NVIDIA GB200 NVL72 datasheet (72 GPUs: 13.4 TB, 576 TB/s, 360 PFLOPS sparse BF16, "
            "NVLink 130 TB/s), one 400 Gb/s ConnectX-7 per GPU; a node is an NVLink domain",
            ranks=72,
            intra_node_gbps=900.0,
            inter_node_gbps=50.0,
            memory_gb=186,
            hbm_gbps=8000.0,
            teraflops=2500.0,
        ),
        _gpu_node(
            "mi300x-8",
            "AMD Instinct MI300X data sheet (192 GB, 5.3 TB/s, 1307 TFLOPS dense, 7 Infinity "
            "Fabric links of 128 GB/s), one 400 Gb/s RoCE NIC per GPU",
            intra_node_gbps=448.0,
            inter_node_gbps=50.0,
            memory_gb=192,
            hbm_gbps=5300.0,
            teraflops=1307.0,
        ),
        Cluster(
            name="local-cpu",
            num_nodes=1,
            ranks_per_node=8,
            intra_node_gbps=2.0,
            intra_node_latency_us=100.0,
            inter_node_gbps=1.0,
            inter_node_latency_us=200.0,
            hbm_gbps=10.0,
            flops=5e10,
            source="assumed, for processes on one machine: measure yours (placer calibrate)",
        ),
    )
}


def load_cluster(
    name_or_path: str | Path,
    *,
    num_nodes: int | None = None,
    ranks_per_node: int | None = None,
) -> Cluster:
    """A preset by name, or a cluster from a TOML file, with so many nodes and ranks.

    Args:
        name_or_path: a key of PRESETS, or the path of a TOML file.
        num_nodes: replaces the cluster's own number.
        ranks_per_node: replaces the cluster's own number; a GPU node has no more than that.

    Raises:
        UsageError: neither a preset nor a file; or numbers that the cluster cannot have.
        BadFileError: the file is not a cluster.
    """
    cluster = PRESETS.get(str(name_or_path))
    if cluster is None:
        path = Path(name_or_path)
        if path.suffix != ".toml" and not path.is_file():
            raise UsageError(
                f"{name_or_path} is neither a cluster preset nor a TOML file",
                among(str(name_or_path), PRESETS, "presets:"),
            )
        cluster = read_cluster(path)
    return cluster.cut(num_nodes, ranks_per_node)

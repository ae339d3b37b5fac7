"""What the cluster makes of slots and messages: room, prices, speeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster, fits, load_cluster
from placer.errors import InfeasibleError, UsageError
from placer.planning.settings import DEFAULT_NODE_WEIGHT, Settings
from placer.trace.model import ModelDims

ELEMENT_BYTES = 2  # of a hidden state in bfloat16


def ranks_per_node(num_ranks: int, num_nodes: int) -> int:
    """Ranks of each node.

    Raises:
        UsageError: they cannot be the same number on all.
    """
    if num_ranks % num_nodes:
        raise UsageError(
            f"{num_nodes} nodes do not divide {num_ranks} GPUs",
            "every node holds the same number of GPUs",
        )
    return num_ranks // num_nodes


def slots_needed(num_experts: int, num_ranks: int, slots_per_rank: int | None) -> int:
    """Slots per rank: what the user said, or the fewest that hold every expert.

    Raises:
        UsageError: ranks do not divide the experts and no slots were given.
        InfeasibleError: too few slots.
    """
    fewest = -(-num_experts // num_ranks)
    if slots_per_rank is None:
        if num_ranks > num_experts:
            raise UsageError(
                f"{num_ranks} ranks are more than the {num_experts} experts: some would hold none",
                f"--gpus {num_experts} or fewer; or --slots-per-rank 1, which fills the other "
                f"{num_ranks - num_experts} slots with replicas or leaves them empty",
            )
        if num_experts % num_ranks:
            raise UsageError(
                f"{num_ranks} ranks do not divide {num_experts} experts",
                f"--slots-per-rank {fewest} leaves {fewest * num_ranks - num_experts} slots for "
                "replicas or empty; or give a number of ranks that divides the experts",
            )
        return fewest
    if slots_per_rank < fewest:
        raise InfeasibleError(
            f"{num_ranks} ranks x {slots_per_rank} slots cannot hold {num_experts} experts",
            f"--slots-per-rank {fewest} or more",
        )
    return min(slots_per_rank, num_experts)


def cluster_of(settings: Settings) -> Cluster | None:
    """The cluster that the settings name, with their nodes and ranks."""
    if settings.cluster is None:
        return None
    return load_cluster(
        settings.cluster,
        num_nodes=settings.num_nodes,
        ranks_per_node=settings.num_ranks // settings.num_nodes,
    )


def prices(
    settings: Settings, cluster: Cluster | None, model: ModelDims
) -> tuple[float, float, float]:
    """What the objective pays: node weight, us of a pair in an expert, us of a message.

    A message carries a hidden state there and its result back over a rank's fast link; under
    coherent dispatch ways back are messages of their own. A message between nodes costs as much
    more as the network is slower.

    Raises:
        UsageError: objective latency without a cluster, or without the model's dimensions.
    """
    node_weight = DEFAULT_NODE_WEIGHT if settings.node_weight is None else settings.node_weight
    if cluster is not None and settings.node_weight is None:
        shared = cluster.ranks_per_node if cluster.inter_node_scope == "node" else 1
        node_weight = cluster.intra_node_gbps / (cluster.inter_node_gbps / shared)
    if settings.num_nodes == 1:
        node_weight = 0.0
    if settings.objective != "latency":
        return node_weight, 0.0, 0.0
    if cluster is None:
        raise UsageError("objective latency needs to know the cluster", "--cluster h100-nvl8")
    missing = [
        name
        for name, value in {
            "hidden_size": model.hidden_size,
            "expert_flops_per_token": model.expert_flops_per_token,
            "flops of the cluster": cluster.flops,
        }.items()
        if value is None
    ]
    if missing:
        raise UsageError(
            f"objective latency needs {', '.join(missing)}, which the trace or cluster lacks",
            "trace with `placer trace`, add the keys to the npz (docs/traces.md), or use traffic",
        )
    assert model.hidden_size is not None
    assert model.expert_flops_per_token is not None
    assert cluster.flops is not None
    states = 1 if settings.dispatch == "coherent" else 2
    message_us = states * model.hidden_size * ELEMENT_BYTES / (cluster.intra_node_gbps * 1e3)
    return node_weight, model.expert_flops_per_token / cluster.flops * 1e6, message_us


def refuse_too_little_memory(
    settings: Settings, cluster: Cluster, dims: ModelDims, num_layers: int, slots: int
) -> None:
    """Raise InfeasibleError when a rank cannot hold its slots.

    With a named model everything counts (`placer.models.check_memory`), else only the experts.
    """
    if settings.model is not None:
        from placer.models import check_memory, load_shape

        shape = load_shape(settings.model)
        check_memory(shape, cluster, slots, kv_tokens=settings.kv_tokens, reserve=settings.reserve)
    elif dims.expert_bytes is not None:
        fits(cluster, num_layers=num_layers, slots_per_rank=slots, expert_bytes=dims.expert_bytes)


def rank_slots(
    settings: Settings, cluster: Cluster, dims: ModelDims, num_layers: int, slots: int
) -> NDArray[np.int64] | None:
    """[L, G] slots that ranks of unlike memory can fill; None where all can fill `slots`.

    Raises:
        InfeasibleError: together they cannot hold the experts; raised by `solvers.Problem`.
    """
    memory = cluster.of_ranks("memory_bytes")
    if memory is None or dims.expert_bytes is None or np.ptp(memory) == 0:
        return None
    room = (memory * (1 - settings.reserve) / (num_layers * dims.expert_bytes)).astype(np.int64)
    if room.min() >= slots:
        return None
    return np.tile(np.minimum(room, slots), (num_layers, 1))


def rank_speed(cluster: Cluster) -> NDArray[np.float64] | None:
    """[G] how fast each rank computes, by its peak; None where all are alike or unknown."""
    flops = cluster.of_ranks("flops")
    return None if flops is None or np.ptp(flops) == 0 else flops


def link_cost(cluster: Cluster) -> NDArray[np.float64] | None:
    """[G, G] cost of a message by measured bandwidths, in messages over the median fast link."""
    if cluster.pair_gbps is None:
        return None
    gbps = np.array(cluster.pair_gbps, np.float64)
    node = np.arange(cluster.num_ranks) // cluster.ranks_per_node
    apart = ~np.eye(cluster.num_ranks, dtype=bool)
    inside = apart & (node[:, None] == node)
    usual = np.median(gbps[inside] if inside.any() else gbps[apart])
    cost = np.zeros_like(gbps)
    cost[apart] = usual / gbps[apart]
    return cost

"""Modelled step times of several placements on the same tokens, as a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.cluster import Cluster, load_cluster
from placer.errors import UsageError
from placer.evaluation import homes_fit
from placer.placement import Placement
from placer.trace.model import ModelDims
from placer.trace.source import TraceSource

if TYPE_CHECKING:
    from placer.cost import ReplicaPolicy
    from placer.models import ModelShape
    from placer.plan import Dispatch


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How step times are modelled.

    Attributes:
        cluster: preset or TOML file.
        model: preset or checkpoint whose dimensions count; None = those of the trace.
        batch_tokens, tokens_per_rank, micro_batches: see `placer.cost.step_time`.
        deduplicate_nodes: one copy of a token per remote node.
    """

    cluster: str
    model: str | None = None
    batch_tokens: int = 256
    tokens_per_rank: int | None = None
    micro_batches: int = 1
    deduplicate_nodes: bool = False


def cluster_for(name: str, placement: Placement) -> Cluster:
    """The cluster with as many nodes and ranks as the placement."""
    return load_cluster(
        name, num_nodes=placement.num_nodes, ranks_per_node=placement.ranks_per_node
    )


def dims_for(model: str | None, source: TraceSource) -> tuple[ModelDims, int | None]:
    """Dimensions of the named model, or of the trace's; and KV bytes per token, where known.

    Raises:
        UsageError: the named model has other layers or experts than the trace.
    """
    if model is None:
        return source.model, None
    num_layers = np.unique(source.layer_ids).size  # a layer may route in several rounds
    shape = shape_for(model, num_layers, source.num_experts)
    return shape.dims, shape.kv_bytes_per_token


def shape_for(model: str, num_layers: int, num_experts: int) -> ModelShape:
    """The shape of the named model, of which a trace has so many MoE layers and experts.

    Raises:
        UsageError: the model has others.
    """
    from placer.models import load_shape

    shape = load_shape(model)
    if (shape.num_experts, shape.num_moe_layers) != (num_experts, num_layers):
        raise UsageError(
            f"{shape.name} has {shape.num_moe_layers} MoE layers of {shape.num_experts} experts, "
            f"the trace {num_layers} of {num_experts}",
            "name the model that was traced",
        )
    return shape


def step_times(
    placements: Mapping[str, Placement],
    source: TraceSource,
    options: TimingOptions,
    *,
    dispatch: Dispatch,
    replica_policy: ReplicaPolicy,
) -> dict[str, Any]:
    """The cluster's name, and name -> summary of the modelled step time of each placement.

    Args:
        placements: all for the same number of ranks and nodes.
        source: the tokens.
        options: how they are priced.
        dispatch: the dispatch model.
        replica_policy: which copy serves a token.
    """
    from placer.cost import Transport, step_time

    dims, kv_bytes = dims_for(options.model, source)
    document: dict[str, Any] = {}
    for name, placement in placements.items():
        cluster = cluster_for(options.cluster, placement)
        document["cluster"] = cluster.name
        document[name] = step_time(
            source.chunks(),
            placement.for_rounds(source.layer_ids),
            cluster,
            dispatch=dispatch,
            dims=dims,
            transport=Transport(
                deduplicate_nodes=options.deduplicate_nodes, kv_bytes_per_token=kv_bytes
            ),
            replica_policy=replica_policy,
            batch_tokens=options.batch_tokens,
            tokens_per_rank=options.tokens_per_rank,
            num_micro_batches=options.micro_batches,
            ignore_home=not homes_fit(source, placement.num_ranks),
        ).summary()
    return document

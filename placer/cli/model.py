"""`placer model`: the dimensions of a model, and whether it fits a cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("model")(model)


def model(
    name: Annotated[
        str, typer.Argument(metavar="NAME|DIR", help="A preset, or a checkpoint's folder.")
    ],
    cluster: options.ClusterName = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Ranks; default: all of the cluster.")
    ] = None,
    nodes: options.Nodes = 1,
    slots_per_rank: options.SlotsPerRank = None,
    kv_tokens: options.KvTokens = 0,
    reserve: options.Reserve = 0.1,
    json_output: options.JsonOutput = False,
) -> None:
    """Show a model's dimensions and, with --cluster, what it takes of every rank's memory.

    Ends with code 3 when it does not fit, and says by how much.
    """
    from placer.cluster import load_cluster
    from placer.models import check_memory, load_shape
    from placer.planning import ranks_per_node, slots_needed
    from placer.report.console import show
    from placer.report.models import model_table

    shape = load_shape(name)
    document: dict[str, Any] = {
        "format": "placer.model",
        "schema_version": 1,
        **{key: getattr(shape, key) for key in shape.__dataclass_fields__},
        "total_params": shape.total_params,
        "memory": None,
    }
    if cluster is not None:
        per_node = None if gpus is None else ranks_per_node(gpus, nodes)
        where = load_cluster(cluster, num_nodes=nodes, ranks_per_node=per_node)
        slots = slots_needed(shape.num_experts, where.num_ranks, slots_per_rank)
        found = check_memory(shape, where, slots, kv_tokens=kv_tokens, reserve=reserve)
        document["memory"] = {
            "cluster": where.name,
            "num_ranks": where.num_ranks,
            "slots_per_rank": slots,
            "kv_tokens": kv_tokens,
            **found.to_document(),
        }
    show(json_output, document, lambda: model_table(document))

"""Inter-layer affinity as a graph, for Gephi, Cytoscape, yEd or networkx.

Shape letters: L layers, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.coactivation import lift
from placer.affinity.information import conditional
from placer.affinity.model import Affinity
from placer.files import atomic_path
from placer.trace.rounds import round_names

if TYPE_CHECKING:
    import networkx as nx


def affinity_graph(
    affinity: Affinity,
    *,
    top_n: int | None = None,
    min_probability: float = 0.0,
    coactivation: bool = False,
) -> nx.DiGraph[str]:
    """A node per layer and expert, an edge per pair of experts that tokens flow between.

    Nodes are named "L3E17" by real layer number and expert, with attributes `layer`, `expert`,
    `load` (tokens) and `load_share` (of the layer). Edges lead from a layer to the next one
    (`kind` "affinity"), with `count` (flow of tokens, 1 / (k_l * k_{l+1}) per pair), `probability`
    P(next expert | expert) and `weight` = probability. O(L E^2 log E).

    Args:
        affinity: the counts.
        top_n: keep the likeliest so many edges of each node; all when None.
        min_probability: drop edges below it.
        coactivation: also join experts of one layer that fire together (`kind` "coactivation"),
            once, from the lower to the higher id: `count` (tokens), `lift`, and `probability` =
            `weight` = the larger of P(one | other) and P(other | one). `top_n` counts for each
            of the two experts: an edge stays when it is among the likeliest of either.
    """
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph(
        num_experts=affinity.num_experts, num_tokens=affinity.num_tokens
    )
    load = affinity.load
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    rows = [name.replace("_", "R") for name in round_names(affinity.layer_ids.tolist())]
    names = [[f"L{row}E{e}" for e in range(affinity.num_experts)] for row in rows]
    for index, layer in enumerate(affinity.layer_ids.tolist()):
        for expert, name in enumerate(names[index]):
            graph.add_node(
                name,
                layer=layer,
                expert=expert,
                load=int(load[index, expert]),
                load_share=float(share[index, expert]),
            )
    probability = conditional(affinity.affinity)
    for index in range(len(probability)):
        keep = _likeliest(probability[index], top_n, min_probability)
        for a, b in np.argwhere(keep).tolist():
            _add_edge(
                graph,
                names[index][a],
                names[index + 1][b],
                kind="affinity",
                probability=float(probability[index, a, b]),
                count=float(affinity.affinity[index, a, b]),
            )
    if coactivation:
        _add_coactivation(graph, affinity, names, top_n, min_probability)
    return graph


def write_graphml(
    affinity: Affinity,
    path: Path,
    *,
    top_n: int | None = 8,
    min_probability: float = 0.0,
    coactivation: bool = False,
    force: bool = False,
) -> None:
    """Write `affinity_graph` as GraphML, atomically; the same counts give the same bytes.

    By default the 8 likeliest edges of each node: all L E^2 would fill gigabytes for a large
    model.
    """
    import networkx as nx

    graph = affinity_graph(
        affinity, top_n=top_n, min_probability=min_probability, coactivation=coactivation
    )
    with atomic_path(path, force=force) as temporary:
        nx.write_graphml_xml(graph, str(temporary))


def _add_coactivation(
    graph: nx.DiGraph[str],
    affinity: Affinity,
    names: list[list[str]],
    top_n: int | None,
    min_probability: float,
) -> None:
    lifts = lift(affinity)
    diagonal = np.arange(affinity.num_experts)
    for index in range(affinity.num_layers):
        together = affinity.coactivation[index].astype(np.float64)
        load = together[diagonal, diagonal]
        together[diagonal, diagonal] = 0
        given = together / np.maximum(load, 1)[:, None]
        keep = _likeliest(given, top_n, min_probability)
        for a, b in np.argwhere(np.triu(keep | keep.T)).tolist():
            _add_edge(
                graph,
                names[index][a],
                names[index][b],
                kind="coactivation",
                probability=float(max(given[a, b], given[b, a])),
                count=float(together[a, b]),
                lift=float(lifts[index, a, b]),
            )


def _add_edge(graph: nx.DiGraph[str], source: str, target: str, **attributes: Any) -> None:
    graph.add_edge(source, target, weight=attributes["probability"], **attributes)


def _likeliest(
    probability: NDArray[np.float64], top_n: int | None, min_probability: float
) -> NDArray[np.bool_]:
    """[E, E] the largest `top_n` entries of each row (ties: lower column), above 0 and the rest."""
    keep = (probability > 0) & (probability >= min_probability)
    if top_n is not None and top_n < probability.shape[1]:
        order = np.argsort(-probability, axis=1, kind="stable")[:, :top_n]
        among = np.zeros(keep.shape, np.bool_)
        np.put_along_axis(among, order, True, axis=1)
        keep &= among
    return keep

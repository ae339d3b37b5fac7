"""The graph of experts, and GraphML that networkx reads back."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from placer.affinity import affinity_graph, conditional, count, lift, write_graphml
from placer.errors import UsageError

from .reference import random_trace, trace_of


def edges_of(graph, kind):
    return [(a, b, d) for a, b, d in graph.edges(data=True) if d["kind"] == kind]


def test_nodes_carry_layer_expert_and_load():
    counts = count(random_trace())
    graph = affinity_graph(counts)
    assert graph.number_of_nodes() == counts.num_layers * counts.num_experts
    node = graph.nodes["L3E2"]  # real layer numbers are 1, 3, 5
    assert (node["layer"], node["expert"], node["load"]) == (3, 2, counts.load[1, 2])
    assert node["load_share"] == pytest.approx(counts.load[1, 2] / counts.load[1].sum())


def test_edges_carry_flow_and_probability():
    counts = count(random_trace(num_tokens=300))
    graph = affinity_graph(counts)
    assert graph.number_of_edges() == (counts.affinity > 0).sum()
    edge = graph.edges["L1E0", "L3E1"]
    assert edge["count"] == counts.affinity[0, 0, 1]
    assert edge["probability"] == edge["weight"] == conditional(counts.affinity)[0, 0, 1]
    assert graph.out_degree("L1E0", weight="probability") == pytest.approx(1)
    assert graph.out_degree("L5E0") == 0


def test_only_the_likeliest_edges_are_kept_when_asked():
    counts = count(random_trace(num_tokens=300))
    probability = conditional(counts.affinity)
    graph = affinity_graph(counts, top_n=2)
    for expert in range(counts.num_experts):
        kept = {b for _, b in graph.out_edges(f"L1E{expert}")}
        assert kept == {f"L3E{b}" for b in np.argsort(-probability[0, expert])[:2]}
    for source, _, edge in affinity_graph(counts, top_n=5, min_probability=0.1).edges(data=True):
        assert edge["probability"] >= 0.1, source
    above = affinity_graph(counts, min_probability=0.3)
    assert above.number_of_edges() == (probability >= 0.3).sum() > 0


def test_coactivation_edges_join_experts_of_a_layer_once():
    counts = count(random_trace(num_tokens=300))
    graph = affinity_graph(counts, coactivation=True)
    inside = edges_of(graph, "coactivation")
    assert len(inside) == np.triu(counts.coactivation > 0, 1).sum()
    edge = graph.edges["L5E1", "L5E4"]
    assert edge["count"] == counts.coactivation[2, 1, 4]
    assert edge["lift"] == pytest.approx(lift(counts)[2, 1, 4])
    smaller = counts.load[2, [1, 4]].min()
    assert edge["probability"] == pytest.approx(counts.coactivation[2, 1, 4] / smaller)
    assert len(edges_of(graph, "affinity")) == (counts.affinity > 0).sum()
    assert not edges_of(affinity_graph(counts), "coactivation")


def test_a_coactivation_edge_stays_when_it_is_likeliest_for_either_expert():
    # expert 2 fires with 0 only, but expert 0 mostly with 1
    tokens = [[[0, 1]], [[0, 1]], [[0, 1]], [[0, 2]]]
    counts = count(trace_of(np.array(tokens, np.int16), 3))
    graph = affinity_graph(counts, top_n=1, coactivation=True)
    assert set(graph.edges) == {("L1E0", "L1E1"), ("L1E0", "L1E2")}
    assert graph.edges["L1E0", "L1E2"]["probability"] == 1


@pytest.mark.parametrize("shape", [{}, {"num_layers": 1}, {"num_experts": 1, "top_k": 1}])
def test_graphml_is_read_back_the_same(tmp_path, shape):
    counts = count(random_trace(num_tokens=50, **shape))
    path = tmp_path / "affinity.graphml"
    write_graphml(counts, path, top_n=3, coactivation=True)
    found = nx.read_graphml(path)
    expected = affinity_graph(counts, top_n=3, coactivation=True)
    assert isinstance(found, nx.DiGraph)
    assert dict(found.nodes(data=True)) == dict(expected.nodes(data=True))
    assert {(a, b): d for a, b, d in found.edges(data=True)} == {
        (a, b): d for a, b, d in expected.edges(data=True)
    }
    assert found.graph["num_experts"] == counts.num_experts


def test_graphml_is_the_same_bytes_again_and_never_replaces_a_file_silently(tmp_path):
    counts = count(random_trace())
    first, second = tmp_path / "a.graphml", tmp_path / "b.graphml"
    write_graphml(counts, first)
    write_graphml(counts, second)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write_graphml(counts, first)
    write_graphml(counts, first, top_n=1, force=True)
    assert first.read_bytes() != second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]

"""Clusters with more than plain links: written, read, cut and refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placer.cluster import Cluster, Network, RankFigures, load_cluster, read_cluster, write_cluster
from placer.errors import BadFileError, UsageError

PLAIN = Cluster(
    name="plain",
    num_nodes=2,
    ranks_per_node=2,
    intra_node_gbps=100.0,
    intra_node_latency_us=2.0,
    inter_node_gbps=10.0,
    inter_node_latency_us=5.0,
    memory_bytes=10**9,
    flops=1e12,
)
TABLE = tuple(tuple(float(i + j + 1) for j in range(4)) for i in range(4))
RICH = replace(
    PLAIN,
    peer_latency_us=1.5,
    intra_node_shared_gbps=50.0,
    same_rank_gbps=9.0,
    network=Network(nodes_per_leaf=1, oversubscription=2.5, spine_latency_us=3.0),
    compute_latency_us=4.0,
    expert_latency_us=0.5,
    compute_overlap=0.25,
    curve_pairs=(1, 8),
    curve_us=(3.0, 9.5),
    curve_expert_bytes=77,
    ranks_at_full_speed=1.5,
    rank_figures=(
        RankFigures(ranks=(1, 3), flops=5e11, memory_bytes=5 * 10**8),
        RankFigures(ranks=(0,), inter_node_gbps=2.0),
    ),
    pair_gbps=TABLE,
    pair_latency_us=TABLE,
)
GOOD = """\
format = "placer.cluster"
schema_version = 2
num_nodes = 2
ranks_per_node = 2
intra_node_gbps = 100
intra_node_latency_us = 2
inter_node_gbps = 10
inter_node_latency_us = 5
"""


def test_everything_that_a_cluster_can_have_reads_back_equal(tmp_path):
    path = tmp_path / "rich.toml"
    write_cluster(path, RICH, fit={"measured": True, "spread": 0.04, "backend": "gloo"})
    assert read_cluster(path) == RICH
    assert "[fit]\nmeasured = true\nspread = 0.04" in path.read_text()


def test_a_file_of_the_first_version_still_reads(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text(GOOD.replace("schema_version = 2", "schema_version = 1"))
    assert read_cluster(path) == replace(PLAIN, name="old", memory_bytes=None, flops=None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("network = 3", "network is 3, expected a table"),
        ("[network]\nnodes_per_leaf = 0", "nodes_per_leaf is 0, expected 1 or more"),
        ("[network]\noversubscription = 2.0", "network: nodes_per_leaf missing"),
        ("[network]\nnodes_per_leaf = 2\noversubscribed = 2", "network: unknown key"),
        ("[network]\nnodes_per_leaf = 1\noversubscription = 0", "oversubscription is 0"),
        ("[network]\nnodes_per_leaf = 1\nspine_latency_us = -1", "spine_latency_us is -1"),
        ("[[rank_figures]]\nflops = 1.0", "rank_figures: ranks missing"),
        ("[[rank_figures]]\nranks = [4]", "name rank 4, the cluster has 4 ranks"),
        ("[[rank_figures]]\nranks = [1, 1]", "name rank 1 twice"),
        ("[[rank_figures]]\nranks = [1.5]", "expected a list of integers"),
        ("[[rank_figures]]\nranks = [1]\nflops = 0.0", "flops is 0.0, expected a positive"),
        ("pair_gbps = [[1.0, 1.0], [1.0, 1.0]]", "go together; one is missing"),
        ("pair_gbps = [[1.0]]\npair_latency_us = [[1.0]]", "must have 4 rows of 4 numbers"),
        ("pair_gbps = [1.0]", "expected a list of lists of numbers"),
        ("peer_latency_us = -1", "peer_latency_us is -1, expected 0 or more"),
        ("compute_overlap = 1.5", "compute_overlap is 1.5, expected 0 to 1"),
        ("ranks_at_full_speed = 0", "ranks_at_full_speed is 0, expected a positive"),
        ("curve_pairs = [1]\ncurve_us = [1.0, 2.0]", "1 points, curve_us 2; expected the same"),
        ("curve_pairs = [2, 1]\ncurve_us = [1.0, 2.0]", "must increase"),
        ("curve_pairs = [1]\ncurve_us = [1.0]", "curve_expert_bytes go together"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(tmp_path, more, message):
    path = tmp_path / "bad.toml"
    path.write_text(GOOD + more + "\n")
    with pytest.raises(BadFileError) as caught:
        read_cluster(path)
    assert message in caught.value.message
    assert "bad.toml" in caught.value.message


def test_figures_of_single_ranks_stand_in_for_the_clusters():
    assert RICH.of_ranks("flops").tolist() == [1e12, 5e11, 1e12, 5e11]
    assert RICH.of_ranks("inter_node_gbps").tolist() == [2.0, 10.0, 10.0, 10.0]
    assert RICH.of_ranks("hbm_gbps") is None
    some = replace(PLAIN, rank_figures=(RankFigures(ranks=(0, 1, 2, 3), hbm_gbps=8.0),))
    np.testing.assert_array_equal(some.of_ranks("hbm_gbps"), [8.0] * 4)


def test_a_cluster_that_describes_single_ranks_cannot_be_cut():
    assert RICH.cut(2, 2) is RICH
    with pytest.raises(UsageError, match="describes its 2 nodes x 2 ranks one by one; 1 x 2"):
        RICH.cut(1, 2)
    assert (
        replace(RICH, rank_figures=(), pair_gbps=None, pair_latency_us=None).cut(4, 2).num_ranks
        == 8
    )


def test_leaves_are_counted_with_a_rest():
    cluster = replace(PLAIN, num_nodes=5, network=Network(nodes_per_leaf=2))
    assert (cluster.num_leaves, cluster.ranks_per_leaf) == (3, 4)
    assert (PLAIN.num_leaves, PLAIN.ranks_per_leaf) == (1, 4)
    assert load_cluster("h100-nvl8-roce", num_nodes=4).num_leaves == 1

"""Clusters: presets, TOML files, and what fits in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placer.cluster import PRESETS, Cluster, fits, load_cluster, read_cluster, write_cluster
from placer.errors import BadFileError, InfeasibleError, UsageError

GOOD = """\
format = "placer.cluster"
schema_version = 1
num_nodes = 2
ranks_per_node = 4
intra_node_gbps = 300
intra_node_latency_us = 4.5
inter_node_gbps = 25.0
inter_node_latency_us = 12
"""


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_names_its_source(name):
    cluster = load_cluster(name, num_nodes=4)
    assert cluster.num_ranks == 4 * cluster.ranks_per_node
    assert cluster.name == name
    assert "assumed" in cluster.source
    assert cluster.intra_node_gbps > cluster.inter_node_gbps


def test_a_node_can_be_cut_but_not_stretched():
    assert load_cluster("h100-nvl8", num_nodes=2, ranks_per_node=4).num_ranks == 8
    assert load_cluster("local-cpu", ranks_per_node=32).num_ranks == 32
    with pytest.raises(UsageError, match="a node of h100-nvl8 has 8 ranks, not 16"):
        load_cluster("h100-nvl8", ranks_per_node=16)


def test_what_is_neither_preset_nor_file_is_refused_with_the_presets():
    with pytest.raises(UsageError, match="neither a cluster preset nor a TOML file") as caught:
        load_cluster("h100")
    assert "h100-nvl8" in caught.value.hint


@pytest.mark.parametrize("name", PRESETS)
def test_written_clusters_read_back_equal(name, tmp_path):
    path = tmp_path / "cluster.toml"
    cluster = replace(
        PRESETS[name], inter_node_scope="node", source='a "quoted" café\\ \n line', flops=None
    )
    write_cluster(path, cluster)
    assert read_cluster(path) == cluster
    assert load_cluster(path) == cluster
    with pytest.raises(UsageError, match="exists already"):
        write_cluster(path, cluster)
    write_cluster(path, PRESETS[name], force=True)
    assert read_cluster(path) == PRESETS[name]


def test_optional_figures_may_be_left_out(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    cluster = load_cluster(path, num_nodes=3)
    assert cluster.name == "mine"
    assert cluster.num_ranks == 12
    assert cluster.memory_bytes is cluster.hbm_gbps is cluster.flops is None
    assert cluster.inter_node_scope == "rank"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("", "", "does not exist", ""),
        ("num_nodes = 2", "num_nodes = ", "is not valid TOML", ""),
        ('"placer.cluster"', '"placer.plan"', "not a cluster file", "must begin with format"),
        ("schema_version = 1", "schema_version = 3", "schema_version 3, this placer reads 1", ""),
        ("schema_version = 1", "schema_version = true", "schema_version True", ""),
        ("schema_version = 1\n", "", "schema_version None", ""),
        ("intra_node_gbps", "intra_nod_gbps", "unknown key 'intra_nod_gbps'",
         "did you mean intra_node_gbps?"),
        ("num_nodes = 2", "zzz = 2", "unknown key 'zzz'", "known: "),
        ("num_nodes = 2\n", "", "num_nodes missing", ""),
        ("num_nodes = 2", "num_nodes = 2.5", "num_nodes is 2.5, expected an integer", ""),
        ("num_nodes = 2", "num_nodes = true", "num_nodes is True, expected an integer", ""),
        ("= 300", '= "fast"', "intra_node_gbps is 'fast', expected a number", ""),
        ("= 300", "= 0", "intra_node_gbps is 0, expected a positive number", ""),
        ("= 300", "= nan", "intra_node_gbps is nan, expected a positive number", ""),
        ("= 4.5", "= -1", "intra_node_latency_us is -1, expected 0 or more", ""),
        ("num_nodes = 2", "num_nodes = 0", "must be at least 1", ""),
        ("num_nodes = 2", 'num_nodes = 2\ninter_node_scope = "rack"',
         "inter_node_scope is 'rack', expected rank or node", ""),
        ("num_nodes = 2", "num_nodes = 2\nname = 3", "name is 3, expected a string", ""),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_a_sentence(tmp_path, old, new, message, hint):
    path = tmp_path / "cluster.toml"
    if old:
        assert old in GOOD
        path.write_text(GOOD.replace(old, new))
    with pytest.raises(BadFileError) as caught:
        load_cluster(path)
    assert message in caught.value.message
    assert "cluster.toml" in caught.value.message
    assert hint in caught.value.hint


def test_a_folder_or_binary_is_a_bad_file(tmp_path):
    with pytest.raises(BadFileError, match="cannot be read"):
        read_cluster(tmp_path)
    path = tmp_path / "cluster.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadFileError, match="cannot be read"):
        read_cluster(path)


def test_a_cluster_of_nonsense_is_refused():
    with pytest.raises(UsageError, match="flops is -1"):
        replace(PRESETS["h100-nvl8"], flops=-1)


def test_memory_check_says_by_how_much_experts_do_not_fit():
    cluster = load_cluster("h100-nvl8", num_nodes=4)
    shape = {"num_layers": 58, "expert_bytes": 44_040_192}
    assert fits(cluster, slots_per_rank=9, **shape) == 80 * 10**9 - 58 * 9 * 44_040_192
    with pytest.raises(InfeasibleError) as caught:
        fits(cluster, slots_per_rank=33, **shape)
    assert "take 84.29 GB (58 layers x 33 slots x 44.04 MB)" in caught.value.message
    assert "has 80.00 GB: 4.29 GB too much" in caught.value.message
    assert "at most 31 slots per rank fit" in caught.value.hint
    with pytest.raises(InfeasibleError, match=r"beside 50\.00 GB of other data"):
        fits(cluster, slots_per_rank=20, other_bytes=50 * 10**9, **shape)


def test_unknown_memory_is_not_checked():
    cluster = Cluster(
        name="x",
        num_nodes=1,
        ranks_per_node=2,
        intra_node_gbps=1.0,
        intra_node_latency_us=0.0,
        inter_node_gbps=1.0,
        inter_node_latency_us=0.0,
    )
    assert fits(cluster, num_layers=9, slots_per_rank=9, expert_bytes=10**15) is None

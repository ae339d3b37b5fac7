"""Moving tokens is faster than letting them stay where the cost model says so, and slower too."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.netlab.coherent import make_random
from benchmarks.netlab.network import NetlabError, check_requirements
from placer.cluster import Cluster, write_cluster
from placer.placement import contiguous
from placer.plan import Plan, write_plan

from .running import bench_in_netlab

pytestmark = [
    pytest.mark.netlab,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
        reason="needs the trace extra",
    ),
]
NUM_LAYERS = 4
LINK = Cluster(
    name="laboratory", num_nodes=2, ranks_per_node=2, intra_node_gbps=1.0,
    intra_node_latency_us=1000.0, inter_node_gbps=0.001, inter_node_latency_us=1000.0,
    inter_node_scope="node", hbm_gbps=10.0, flops=2e10, source="assumed: 8 Mbit/s",
)  # fmt: skip


@pytest.mark.parametrize(("key_heads", "head_size", "moving_pays"), [(1, 16, True), (8, 64, False)])
def test_keys_and_values_decide_whether_moving_tokens_pays(
    tmp_path, key_heads, head_size, moving_pays
):
    try:
        check_requirements()
    except NetlabError as error:
        pytest.skip(str(error))
    model, plan, cluster = tmp_path / "model", tmp_path / "plan.json", tmp_path / "cluster.toml"
    make_random(model, head_size=head_size, key_heads=key_heads, num_layers=NUM_LAYERS)
    write_plan(Plan(contiguous(NUM_LAYERS, 16, 4, 4, 2), tuple(range(NUM_LAYERS))), plan)
    write_cluster(cluster, LINK)
    words = [f"word {i}" for i in range(32)]
    bench = [
        "bench", plan, "--model", model, "--dtype", "float32", "--baseline", plan,
        "--dispatch", "coherent", "--dispatch", "alltoall", "--cluster", cluster,
        *(part for word in words for part in ("--prompt", word)),
        "--repeats", 2, "--max-new-tokens", 6, "--json",
    ]  # fmt: skip
    arms = bench_in_netlab(bench, mbit=8)[0]["arms"]
    assert all(all(arm["exact"].values()) for arm in arms.values())
    moving, staying = arms["plan"]["measured"], arms["plan (alltoall)"]["measured"]
    assert moving["kv_bytes"]["other_node"] > 0 == staying["kv_bytes"]["other_node"]
    passes, rounds = 6, NUM_LAYERS
    assert staying["collectives"]["all_to_all"] == 2 * rounds * passes
    assert moving["collectives"]["all_to_all"] == 2 * rounds + rounds * (passes - 1)
    decode = arms["plan (alltoall)"]["plan_against_it"]["by_phase"]["decode"]
    if moving_pays:
        assert decode["predicted"] > 1.3
        assert decode["measured"] > 1
    else:
        assert decode["predicted"] < 0.7
        assert decode["measured"] < 1

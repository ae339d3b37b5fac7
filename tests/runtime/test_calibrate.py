"""Calibration: the fit finds what made the times; real processes give a cluster that predicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placer.cluster import Cluster, read_cluster, write_cluster
from placer.cost.compute import curve_increments
from placer.cost.links import Links
from placer.errors import UsageError
from placer.runtime.calibrate import assembled, calibrate, program_for
from placer.runtime.calibrate_fit import states_of, work_of_layers
from placer.runtime.calibrate_probes import (
    Exchange,
    Layer,
    Measured,
    routing_of,
    span_of_nodes,
    targets_of,
)
from placer.runtime.context import RankContext
from placer.trace.model import ModelDims

from .models import SHIPPED

TRUE = Cluster(
    name="true",
    num_nodes=1,
    ranks_per_node=4,
    intra_node_gbps=1.5,
    intra_node_latency_us=400.0,
    inter_node_gbps=1.0,
    inter_node_latency_us=1.0,
    intra_node_shared_gbps=2.5,
    same_rank_gbps=2.0,
    ranks_at_full_speed=1.6,
)
EXPERT_US = {1: 30.0, 2: 33.0, 4: 40.0, 8: 55.0, 16: 90.0, 32: 160.0, 64: 300.0, 128: 580.0,
             256: 1140.0}  # fmt: skip
FIXED_US = 120.0
DIMS = ModelDims("m", 4096, 10_000_000, 2e7)


def context_of(num_ranks, per_node):
    return RankContext(0, num_ranks, per_node, 0, "", 0, serves_store=False)


def a_program(num_nodes=1):
    return program_for(
        None, 4, num_nodes, dtype="auto", hidden_size=4096, element_bytes=4, num_experts=32,
        top_k=4, with_pairs=False, repeats=5,
    )  # fmt: skip


def exact_times(program):
    """What the true cluster takes for every probe, by the cost model's formulas."""
    links, state_bytes = Links(TRUE), 4096 * 4
    latency = links.latency_us(in_turn=False)

    def exchange(states):
        return 2 * (links.transfer(states, None, state_bytes).wire_us[:, 0] + latency)

    layers, own = [], []
    for layer in program.layers:
        ranks = routing_of(layer, 32, 4, 4) // 8
        states = np.zeros((1, 1, 4, 2, 4), np.int32)
        for home, token in ((h, t) for h in range(4) for t in ranks[h]):
            for rank in set(token.tolist()):
                if rank == home:
                    states[0, 0, 3, :, home] += 1
                else:
                    states[0, 0, 0, 0, home] += 1
                    states[0, 0, 0, 1, rank] += 1
        pairs = layer.tokens * 4 * 4 // 32
        work = FIXED_US + 8 * EXPERT_US[pairs]
        own.append(work * 4 / TRUE.ranks_at_full_speed)
        layers.append(exchange(states)[0] + own[-1])
    computations = [
        (FIXED_US + probe.experts * EXPERT_US[probe.pairs])
        * (1 if probe.alone else 4 / TRUE.ranks_at_full_speed)
        for probe in program.computations
    ]
    states = states_of(program.exchanges, context_of(4, 4))
    return Measured(
        exchange(states), np.array(computations), np.array(layers), np.array(own), None,
        (), state_bytes, 0.0, "gloo",
    )  # fmt: skip


def test_the_fit_finds_the_parameters_that_made_the_times():
    program = a_program()
    found = assembled(program, exact_times(program), DIMS, context_of(4, 4), "found")
    cluster = found.cluster
    for name in ("intra_node_latency_us", "intra_node_gbps", "intra_node_shared_gbps",
                 "same_rank_gbps", "ranks_at_full_speed"):  # fmt: skip
        assert getattr(cluster, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    assert found.links.errors.max() < 0.01
    assert cluster.compute_latency_us == pytest.approx(FIXED_US, rel=0.01)
    assert cluster.curve_pairs == tuple(EXPERT_US)
    assert cluster.curve_us == pytest.approx(tuple(EXPERT_US.values()), rel=0.05)
    assert curve_increments(cluster, DIMS)[:3].sum() == pytest.approx(36.5, rel=0.05)
    assert curve_increments(cluster, replace(DIMS, expert_bytes=1)).size == 0
    assert 0 < found.summary()["roofline_error_median"] < 0.2  # the true times are no roofline


@pytest.mark.parametrize("scope", ["rank", "node"])
def test_it_is_told_whether_the_ranks_of_a_node_share_its_network_link(scope):
    network = 0.004 if scope == "node" else 0.002
    true = replace(TRUE, num_nodes=2, ranks_per_node=2, inter_node_gbps=network,
                   inter_node_latency_us=800.0, inter_node_scope=scope)  # fmt: skip
    program = replace(a_program(2), layers=(), computations=())
    links, context = Links(true), context_of(4, 2)
    wire = links.transfer(states_of(program.exchanges, context), None, 4096 * 4).wire_us[:, 0]
    none = np.zeros(0)
    times = Measured(2 * (wire + links.latency_us(in_turn=False)), none, none, none, None, (),
                     4096 * 4, 0.0, "gloo")  # fmt: skip
    found = assembled(program, times, DIMS, context, "found").cluster
    assert found.inter_node_scope == scope
    assert found.inter_node_gbps == pytest.approx(network, rel=0.02)
    assert "between nodes" not in found.source


def test_over_a_slow_network_experts_are_timed_by_the_ranks_own_clocks():
    """1 % of error in a transfer of 100 ms is more than all experts of a layer take."""
    cluster = replace(TRUE, num_nodes=2, ranks_per_node=2, inter_node_gbps=0.002,
                      inter_node_scope="node", ranks_at_full_speed=None)  # fmt: skip
    layers, own = a_program(2).layers, np.full(len(a_program(2).layers), 250.0)
    _, work = work_of_layers(cluster, layers, np.full(len(layers), 1e5), own, 32, 4, 4096 * 4)
    assert work[-1] == 250.0


def test_patterns_of_exchanges_move_what_they_say():
    context = context_of(4, 2)
    by_pattern = {
        name: states_of([Exchange(name, 6)], context)[0, 0]
        for name in ("stay", "next", "across", "first", "one", "all")
    }
    assert by_pattern["stay"][3, 0].tolist() == [6] * 4
    assert by_pattern["stay"][:3].sum() == 0
    assert by_pattern["next"][0, 0].tolist() == by_pattern["next"][0, 1].tolist() == [6] * 4
    assert by_pattern["across"][1, 0].tolist() == by_pattern["across"][1, 1].tolist() == [6] * 4
    assert by_pattern["first"][1].tolist() == [[6, 0, 6, 0], [6, 0, 6, 0]]
    assert by_pattern["one"][0].tolist() == [[6, 0, 0, 0], [0, 6, 0, 0]]
    assert by_pattern["all"][:, 0].sum() == 24
    assert [t.size for t in targets_of(Exchange("one", 6), context)] == [6, 0, 0, 0]


def test_every_expert_of_a_probing_layer_has_as_many_pairs_and_no_token_an_expert_twice():
    for experts, top_k, ranks in ((32, 4, 2), (60, 4, 4), (8, 2, 8), (256, 8, 4)):
        for layer in program_for(
            None, ranks, 1, dtype="auto", hidden_size=64, element_bytes=4, num_experts=experts,
            top_k=top_k, with_pairs=False, repeats=5,
        ).layers[:3]:  # fmt: skip
            total = -(-experts // ranks) * ranks
            chosen = routing_of(Layer(layer.tokens), total, top_k, ranks)
            assert len(set(np.bincount(chosen.reshape(-1), minlength=total))) == 1
            assert all(len(set(token)) == top_k for token in chosen.reshape(-1, top_k).tolist())


def test_a_node_takes_from_its_first_begin_to_its_last_end():
    nan = np.nan
    times = np.array([[[1.0, 3.0]], [[2.0, 5.0]], [[10.0, 11.0]], [[nan, nan]]])
    assert span_of_nodes(times, 2).tolist() == [4.0]
    assert span_of_nodes(times[2:], 2).tolist() == [1.0]
    assert span_of_nodes(times[:, :0], 2).shape == (0,)  # nothing was computed


@pytest.mark.slow
def test_links_alone_can_be_measured_without_a_model():
    cluster = calibrate(None, 2, hidden_size=256, repeats=3).cluster
    assert cluster.flops is None is cluster.hbm_gbps
    assert cluster.curve_pairs == ()
    assert cluster.intra_node_latency_us > 0 < cluster.intra_node_gbps
    assert "1,024-byte states" in cluster.source


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UsageError, match="fewer than 2 ranks"):
        calibrate(None, 1)
    with pytest.raises(UsageError, match="3 nodes do not divide 4 ranks"):
        calibrate(None, 4, 3)
    with pytest.raises(UsageError, match="repeats is 2"):
        calibrate(None, 2, repeats=2)


def test_two_real_ranks_give_a_cluster_file_that_says_how_well_it_fits(tmp_path):
    found = calibrate(SHIPPED, 2, dtype="float32", with_pairs=True, repeats=3)
    cluster = found.cluster
    assert cluster.num_ranks == 2
    assert cluster.curve_expert_bytes == 2 * 36_864  # as float32
    assert len(cluster.curve_pairs) == len(cluster.curve_us) > 3
    assert min(cluster.curve_us) > 0
    assert cluster.pair_gbps[0][1] > 0 < cluster.pair_gbps[1][0]
    assert cluster.source.startswith("measured: placer calibrate, gloo, 2 ranks on 1 node,")
    assert "between nodes nothing was measured" in cluster.source
    path = tmp_path / "here.toml"
    summary = found.summary()
    write_cluster(path, cluster, fit=summary)
    assert read_cluster(path) == cluster
    assert "transfer_error_median = " in path.read_text()
    assert summary["measured"] is True

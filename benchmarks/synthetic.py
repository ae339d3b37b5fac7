"""Synthetic traces with the structure of real ones, of any size.

    python benchmarks/synthetic.py big.npz --layers 58 --experts 256 --top-k 8

A token has a hidden topic: mostly its request's, else another. In every layer an expert's logit is
its popularity, plus what it gives to the token's topic, plus noise of the token's own; the top-k
are taken, the first of them the primary. How much topics count is set so that the primary experts
of consecutive layers share BITS of mutual information, as GPT-OSS-20B's and DeepSeek-V2-Lite's do;
the program prints what it made of that, and of the hottest expert, which carries 2 to 4 times the
mean in these models. Cost: O(T L E) random numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from placer.trace import Trace, make_trace, write_npz

NUM_TOPICS = 48
POPULARITY = 0.25  # standard deviation, in units of the noise
BITS = 0.55
PILOT_STEPS = 7
OWN_TOPIC = 0.7


def synthetic_trace(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_tokens: int = 32768,
    num_requests: int = 512,
    seed: int = 0,
    gain: float | None = None,
) -> Trace:
    """A trace of decode tokens, requests interleaved as in continuous batches of 64.

    Args:
        gain: standard deviation of what an expert gives to a topic, in units of the noise; None =
            found by bisection on a pilot of two layers.
    """
    if gain is None:
        gain = _gain_for(num_experts, top_k, seed)
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(NUM_TOPICS, 0.5))
    topic_of_request = rng.choice(NUM_TOPICS, num_requests, p=share)
    batch = 64
    round_, place = np.divmod(np.arange(num_tokens), batch)
    length = -(-num_tokens // num_requests)
    request = (round_ // length * batch + place) % num_requests
    stays = rng.random(num_tokens) < OWN_TOPIC
    topic = np.where(stays, topic_of_request[request], rng.choice(NUM_TOPICS, num_tokens, p=share))
    experts = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        popularity = rng.normal(0, POPULARITY, num_experts)
        logits = rng.normal(0, gain, (NUM_TOPICS, num_experts)) + popularity
        experts[:, layer] = _top(logits.astype(np.float32), topic, top_k, rng)
    return make_trace(
        experts=experts,
        num_experts=num_experts,
        request=request,
        position=round_ % length,
        phase=np.ones(num_tokens, np.uint8),
        step=round_,
    )


def _gain_for(num_experts: int, top_k: int, seed: int) -> float:
    """The gain at which a pilot's consecutive primary experts share BITS."""
    low, high = 0.0, 3.0
    for _ in range(PILOT_STEPS):
        middle = (low + high) / 2
        pilot = synthetic_trace(
            num_layers=3,
            num_experts=num_experts,
            top_k=top_k,
            num_tokens=max(32768, 2 * num_experts**2),  # or the estimate is biased
            seed=seed,
            gain=middle,
        )
        if structure(pilot)[0] < BITS:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _top(
    gain: NDArray[np.float32], topic: NDArray[np.int64], top_k: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """[T, K] the experts with the highest logits, highest first."""
    chosen = np.empty((topic.size, top_k), np.int16)
    for first in range(0, topic.size, 8192):
        part = slice(first, first + 8192)
        logits = gain[topic[part]]
        logits += rng.standard_normal(logits.shape, np.float32)
        best = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
        order = np.argsort(-np.take_along_axis(logits, best, axis=1), axis=1)
        chosen[part] = np.take_along_axis(best, order, axis=1)
    return chosen


def structure(trace: Trace) -> tuple[float, float]:
    """Bits of mutual information of consecutive primary experts, and the hottest expert's load.

    The first is corrected for the bias of finite samples (Miller and Madow); the second is in units
    of the mean load, averaged over layers.
    """
    first = trace.experts[:, :, 0].astype(np.int64)
    size = trace.num_experts
    bits = []
    for layer in range(trace.num_layers - 1):
        joint = np.bincount(
            first[:, layer] * size + first[:, layer + 1], minlength=size * size
        ).reshape(size, size)
        total = joint.sum()
        rows, columns = joint.sum(axis=1), joint.sum(axis=0)
        used = joint > 0
        expected = np.outer(rows, columns)
        found = (joint[used] * np.log2(joint[used] * total / expected[used])).sum() / total
        cells = used.sum() - (rows > 0).sum() - (columns > 0).sum() + 1
        bits.append(found - cells / (2 * total * np.log(2)))
    load = np.stack([np.bincount(layer.ravel(), minlength=size) for layer in
                     trace.experts.swapaxes(0, 1)])  # fmt: skip
    return float(np.mean(bits)), float((load.max(axis=1) / load.mean(axis=1)).mean())


def main() -> None:
    """Make a trace, say what it is like, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trace = synthetic_trace(
        num_layers=arguments.layers,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        num_tokens=arguments.tokens,
        num_requests=arguments.requests,
        seed=arguments.seed,
    )
    bits, hottest = structure(trace)
    print(f"mutual information {bits:.2f} bits, hottest expert {hottest:.1f} x the mean")
    write_npz(trace, arguments.output)


if __name__ == "__main__":
    main()

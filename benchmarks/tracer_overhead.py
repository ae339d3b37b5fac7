"""What tracing costs: decode time with and without `placer.capture`, in turn.

    python benchmarks/tracer_overhead.py [--device cuda --dtype bfloat16] [--folder DIR] [--json]

A randomly initialised Qwen3-MoE decodes the same batch again and again, in pairs of a plain and a
traced run whose order alternates, so that drift of the machine cancels. The figure is the median
over pairs, with a 95 % bootstrap interval. On the CPU, processor time is used, which other programs
disturb less than the clock; on CUDA, the clock. Handing the tokens on is part of the traced time;
the first passes, where the experts are found, are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from placer.tracer import capture


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        moe_intermediate_size=options.hidden // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=options.hidden // 8,
        num_experts=options.experts,
        num_experts_per_tok=8,
    )
    model = Qwen3MoeForCausalLM(config).eval().to(options.device, getattr(torch, options.dtype))
    _decode(model, options, None)  # warm up
    ratios, plain_us = [], []
    for pair in range(options.pairs):
        seconds: dict[bool, float] = {}
        for is_traced in (pair % 2 == 0, pair % 2 == 1):
            with contextlib.ExitStack() as stack:
                tracer = None
                if is_traced:
                    folder = options.folder and stack.enter_context(
                        tempfile.TemporaryDirectory(dir=options.folder)
                    )
                    path = Path(folder) / "trace" if folder else None
                    tracer = stack.enter_context(capture(model, path, weights=options.weights))
                seconds[is_traced] = _decode(model, options, tracer)
        ratios.append(seconds[True] / seconds[False])
        plain_us.append(seconds[False] / options.steps * 1e6)
    _report(options, ratios, plain_us)


def _decode(model: Any, options: argparse.Namespace, tracer: Any) -> float:
    """Seconds of the decode steps, after a prefill and one step that are not timed."""
    tokens = torch.randint(0, 8192, (options.batch, options.prompt), device=options.device)
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        step = tokens[:, -1:]
        model(input_ids=step, past_key_values=cache)
        start = _now(options.device)
        for _ in range(options.steps):
            step = model(input_ids=step, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        if tracer is not None:
            tracer.flush()
        return _now(options.device) - start


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _report(options: argparse.Namespace, ratios: list[float], plain_us: list[float]) -> None:
    generator = np.random.default_rng(0)
    samples = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    result = {
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "num_layers": options.layers,
        "num_experts": options.experts,
        "hidden_size": options.hidden,
        "batch_size": options.batch,
        "steps": options.steps,
        "pairs": options.pairs,
        "weights": options.weights,
        "to_folder": bool(options.folder),
        "plain_us_per_step": statistics.median(plain_us),
        "overhead_percent": (statistics.median(ratios) - 1) * 100,
        "overhead_percent_interval": [(low - 1) * 100, (high - 1) * 100],
    }
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    print(
        f"decode step {result['plain_us_per_step']:.0f} us; tracing adds "
        f"{result['overhead_percent']:.2f} % "
        f"(95 % interval {(low - 1) * 100:.2f} to {(high - 1) * 100:.2f} %, {len(ratios)} pairs)"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="0 leaves torch's own choice")
    parser.add_argument("--weights", action="store_true", help="keep gate weights")
    parser.add_argument("--folder", help="stream traces to folders in here")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What tracing adds to vLLM's steps: processor time with and without the plugin, on a CPU.

    make test-vllm                                  # sets up .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_capture_overhead.py

Each run is a process of its own with the whole engine in it; runs alternate. The model is a random
Qwen3-MoE, made on the spot. Elsewhere than in .venv-vllm it says so and ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPEATS = 5
MODES = {"plain": {}, "traced": {}, "traced, with weights": {"PLACER_TRACE_WEIGHTS": "1"}}
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
}


def make_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).to(torch.bfloat16).save_pretrained(folder)


def run_engine(model: str) -> None:
    """In a process of its own: print seconds of processor time per prefilled and decoded token."""
    import time

    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": [(7 * i + j) % 2048 for j in range(200)]} for i in range(8)]

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=tokens, detokenize=False
        )
        before = time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.process_time() - before

    seconds(8)
    prefill = seconds(1)
    both = seconds(65)
    print("RESULT", json.dumps({"prefill": prefill / 1600, "decode": (both - prefill) / 512}))


def measure(model: Path, mode: str, folder: Path) -> dict[str, float]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        **MODES[mode],
    }
    environment.pop("PLACER_TRACE_DIR", None)
    if mode != "plain":
        environment["PLACER_TRACE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, __file__, str(model)], env=environment, capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            found: dict[str, float] = json.loads(line.removeprefix("RESULT"))
            return found
    raise SystemExit(done.stderr[-2000:])


def main() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: run this with .venv-vllm/bin/python")
        return
    if len(sys.argv) > 1:
        run_engine(sys.argv[1])
        return
    import numpy as np

    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        for repeat in range(REPEATS):
            for mode in MODES:
                folder = Path(name) / f"trace-{repeat}-{len(mode)}"
                runs[mode].append(measure(Path(name) / "model", mode, folder))
    for part in ("prefill", "decode"):
        plain = np.array([run[part] for run in runs["plain"]])
        for mode, found in runs.items():
            us = np.array([run[part] for run in found]) * 1e6
            change = us / (plain * 1e6) - 1
            print(
                f"{part:8} {mode:22} {np.median(us):8.1f} us a token"
                f"   {100 * np.median(change):+5.1f} % (each pair: "
                f"{', '.join(f'{100 * one:+.1f}' for one in change)})"
            )


if __name__ == "__main__":
    main()

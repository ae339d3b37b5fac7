"""What tracing adds to vLLM's steps: processor time with recording on and off in turn, on a CPU.

    make test-vllm                                  # sets up .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_capture_overhead.py

One process holds the whole engine and a random Qwen3-MoE, made on the spot; rounds with the
recorder awake and asleep alternate, so that a busy machine disturbs both alike. Asleep, a router
still passes its ids through the plugin's operator. Outside .venv-vllm it says so and ends.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

PAIRS = 15
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
BATCH, PROMPT, DECODED = 8, 200, 33


def make_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).to(torch.bfloat16).save_pretrained(folder)


def start_engine(model: Path) -> tuple[Any, Any]:
    """The engine, and the recorder inside it."""
    from vllm import LLM

    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=BATCH,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
    )
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return llm, executor.driver_worker.placer_recorder


def main() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: run this with .venv-vllm/bin/python")
        return
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        os.environ["PLACER_TRACE_DIR"] = str(Path(name) / "trace")
        make_model(Path(name) / "model")
        from vllm import SamplingParams

        llm, recorder = start_engine(Path(name) / "model")
        prompts = [
            {"prompt_token_ids": [(7 * i + j) % 2048 for j in range(PROMPT)]} for i in range(BATCH)
        ]

        def seconds(tokens: int, awake: bool) -> float:
            recorder._serving = recorder._buffers.active = awake
            sampling = SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=tokens, detokenize=False
            )
            before = time.process_time()
            llm.generate(prompts, sampling, use_tqdm=False)
            return time.process_time() - before

        for awake in (True, False):
            seconds(4, awake)
        found = {}
        for part, tokens in (("prefill", 1), ("decode", DECODED)):
            found[part] = np.array(
                [[seconds(tokens, awake) for awake in (True, False)] for _ in range(PAIRS)]
            )
        recorder.close()
    rng = np.random.default_rng(0)
    for part, times in found.items():
        change = 100 * (times[:, 0] / times[:, 1] - 1)
        drawn = np.median(rng.choice(change, (2000, PAIRS)), axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        print(
            f"{part:8} {1e3 * np.median(times[:, 1]):7.1f} ms asleep; recording adds "
            f"{np.median(change):+.1f} % (95 %: {low:+.1f} to {high:+.1f}, {PAIRS} pairs)"
        )


if __name__ == "__main__":
    main()

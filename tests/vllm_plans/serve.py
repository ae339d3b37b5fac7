"""Runs vLLM with expert parallelism in a process of its own; writes what it generated and holds.

usage: python serve.py job.json result.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def expert_maps(worker: Any) -> dict[str, list[int]]:
    """Layer name -> place of each expert on this rank, -1 where it is not."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {
        module.layer_name: module._expert_map.tolist()
        for module in worker.model_runner.model.modules()
        if isinstance(module, RoutedExperts)
    }


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    llm = LLM(
        seed=0,
        dtype="float32",
        disable_log_stats=True,
        max_model_len=128,
        max_num_seqs=4,
        block_size=32,
        enforce_eager=True,
        enable_expert_parallel=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        model=job["model"],
    )
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
    outputs = llm.generate(job["prompts"], sampling, use_tqdm=False)
    result = {
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
        "maps": llm.collective_rpc(expert_maps),
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

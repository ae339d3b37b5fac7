"""Starts vLLM with expert parallelism in a process of its own; writes what each rank holds.

usage: python serve.py model result.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def held_experts(worker: Any) -> dict[str, list[list[Any]]]:
    """Layer name -> [expert, its place on this rank, digest of its weights there]."""
    import hashlib

    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    held: dict[str, list[list[Any]]] = {}
    for layer in worker.model_runner.model.modules():
        if not isinstance(layer, RoutedExperts):
            continue
        held[layer.layer_name] = []
        for expert, place in enumerate(layer._expert_map.tolist()):
            if place >= 0:
                digest = hashlib.sha256()
                for weight in (layer.w13_weight, layer.w2_weight):
                    digest.update(weight[place].contiguous().numpy().tobytes())
                held[layer.layer_name].append([expert, place, digest.hexdigest()])
    return held


def main(model: str, result_file: str) -> None:
    from vllm import LLM

    llm = LLM(
        model=model,
        dtype="float32",
        disable_log_stats=True,
        max_model_len=128,
        max_num_seqs=4,
        block_size=32,
        enforce_eager=True,
        enable_expert_parallel=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    Path(result_file).write_text(json.dumps(llm.collective_rpc(held_experts)))


if __name__ == "__main__":
    main(*sys.argv[1:])

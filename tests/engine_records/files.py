"""Files as the engines lay them out, made of known routing."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K = 3, 8, 2  # layers 1 and 2 have experts, layer 0 is dense
MOE_LAYERS = [1, 2]


def routing(seed: int = 0, tokens: int = 12) -> np.ndarray:
    """[tokens, MOE_LAYERS, TOP_K] distinct experts, 0 .. EXPERTS - 1 each used."""
    rng = np.random.default_rng(seed)
    shape = (tokens, len(MOE_LAYERS), EXPERTS)
    chosen = rng.permuted(np.broadcast_to(np.arange(EXPERTS), shape), axis=2)[:, :, :TOP_K]
    every = np.arange(EXPERTS).reshape(-1, 1, TOP_K)
    chosen[: len(every)] = every[:tokens]
    return np.ascontiguousarray(chosen)


def load_of(experts: np.ndarray) -> np.ndarray:
    """[MOE_LAYERS, EXPERTS] how often each expert is used."""
    return np.stack(
        [np.bincount(experts[:, i].reshape(-1), minlength=EXPERTS) for i in range(len(MOE_LAYERS))]
    )


def with_dense(table: np.ndarray, fill: int, axis: int = 0) -> np.ndarray:
    """The table over MOE_LAYERS with a row for the dense layer before it."""
    pad = [(0, 0)] * table.ndim
    pad[axis] = (1, 0)
    return np.pad(table, pad, constant_values=fill)


def npy_base64(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def vllm_response(experts: np.ndarray, prompt: int, **more: Any) -> dict[str, Any]:
    """A completion of vLLM for a prompt of `prompt` tokens; the last token was never routed."""
    generated = len(experts) + 1 - prompt
    return {
        "choices": [
            {"routed_experts": npy_base64(with_dense(experts, 0, axis=1).astype(np.uint8))}
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated},
        **more,
    }


def sglang_response(experts: np.ndarray, prompt: int) -> dict[str, Any]:
    """A response of SGLang's /generate."""
    flat = with_dense(experts, 0, axis=1).astype("<i4").tobytes()
    return {
        "text": "",
        "meta_info": {
            "prompt_tokens": prompt,
            "completion_tokens": len(experts) + 1 - prompt,
            "routed_experts": base64.b64encode(flat).decode(),
        },
    }


def write_lines(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def vllm_load_lines(load: np.ndarray, step: int, event: str = "iteration") -> list[dict[str, Any]]:
    """The lines of vLLM's expert-load statistics for one pass or interval."""
    of_window = (
        {"event": "vllm.expert_load.iteration", "iteration": step}
        if event == "iteration"
        else {"event": "vllm.expert_load", "step_begin": step, "step_end": step}
    )
    return [
        {**of_window, "dp_rank": 0, "layer": layer, "counts": counts.tolist()}
        for layer, counts in zip(MOE_LAYERS, load, strict=True)
    ]

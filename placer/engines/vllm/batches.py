"""Whose tokens the rows of a forward pass are.

vLLM 0.32 has two model runners (`vllm/v1/worker/gpu_model_runner.py`, and
`vllm/v1/worker/gpu/model_runner.py`, which it calls V2); both leave the batch that they ran where
it can be read until the tokens are sampled. Rows stand in the order of the batch's requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """The requests of one forward pass.

    Attributes:
        request_ids: [R] vLLM's names of the requests, in the order of their rows.
        num_tokens: [R] int64 rows of each.
        prompt_length: [R] int64 tokens of each one's prompt.
        position: [T] the tokens' positions, on the device; valid until the next pass.
    """

    request_ids: list[str]
    num_tokens: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    position: torch.Tensor


def last_batch(runner: Any, scheduler_output: Any) -> Batch | None:
    """The batch that the model runner has just run; None when it ran nothing."""
    if not scheduler_output.total_num_scheduled_tokens:
        return None
    if hasattr(runner, "req_states"):
        return _last_batch_v2(runner)
    request_ids = list(runner.input_batch.req_ids)
    scheduled = scheduler_output.num_scheduled_tokens
    num_tokens = np.array([scheduled[name] for name in request_ids], np.int64)
    prompt_length = runner.input_batch.num_prompt_tokens[: len(request_ids)]
    position = runner.positions[: int(num_tokens.sum())]
    return Batch(request_ids, num_tokens, np.array(prompt_length, np.int64), position)


def _last_batch_v2(runner: Any) -> Batch | None:
    state = runner.execute_model_state
    if state is None:
        return None
    batch = state.input_batch
    num_requests = len(batch.req_ids)
    num_tokens = np.diff(batch.query_start_loc_np[: num_requests + 1]).astype(np.int64)
    return Batch(
        request_ids=list(batch.req_ids),
        num_tokens=num_tokens,
        prompt_length=runner.req_states.prompt_len.np[batch.idx_mapping_np].astype(np.int64),
        position=batch.positions[: int(num_tokens.sum())],
    )

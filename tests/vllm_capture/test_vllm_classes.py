"""What placer relies on in vLLM's own classes where the engine does not run on a CPU."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest

from placer.engines.records import RECORD_FORMATS, Hints
from placer.engines.vllm.batches import last_batch
from placer.trace import Trace
from tests.engine_records.files import EXPERTS, routing, with_dense

pytestmark = pytest.mark.vllm


def test_a_batch_of_the_second_model_runner_is_understood():
    """That runner needs Triton; its batch and its table of requests are made without it here."""
    import torch
    from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.gpu.model_runner import ExecuteModelState
    from vllm.v1.worker.gpu.states import RequestState

    assert {"input_batch"} <= set(ExecuteModelState._fields)
    batch = InputBatch.make_dummy(2, 5, InputBuffers(4, 16, torch.device("cpu")))
    batch.idx_mapping_np = np.array([3, 1])
    batch.positions[:] = torch.tensor([7, 8, 0, 1, 2])
    # the table of requests lies in pinned memory, which a machine without a GPU lacks
    assert "self.prompt_len = UvaBackedTensor(" in inspect.getsource(RequestState.__init__)
    assert "self.np = " in inspect.getsource(UvaBackedTensor.__init__)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([10, 11, 12, 13], np.int32)))
    runner = SimpleNamespace(
        req_states=states, execute_model_state=SimpleNamespace(input_batch=batch)
    )
    found = last_batch(runner, SimpleNamespace(total_num_scheduled_tokens=5))
    assert found is not None
    assert found.request_ids == batch.req_ids
    assert found.num_tokens.tolist() == [2, 3]
    assert found.prompt_length.tolist() == [13, 11]
    assert found.position.tolist() == [7, 8, 0, 1, 2]


def test_routed_experts_are_read_as_vllm_encodes_them(tmp_path):
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponse,
        ChatCompletionResponseChoice,
        ChatMessage,
    )
    from vllm.utils.serial_utils import numpy2base64

    experts = routing(0, 9)
    response = ChatCompletionResponse(
        model="small",
        choices=[
            ChatCompletionResponseChoice(
                index=0,
                message=ChatMessage(role="assistant", content="x"),
                routed_experts=numpy2base64(with_dense(experts, 0, axis=1).astype(np.uint8)),
            )
        ],
        usage={"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10},
    )
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps(json.loads(response.model_dump_json())) + "\n")
    trace = RECORD_FORMATS["routed-experts"].read(path, Hints(num_experts=EXPERTS)).content
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.experts, experts)
    assert trace.phase.tolist() == [0] * 6 + [1] * 3

"""Every family that the tracer knows: the configuration alone gives the built model's shape."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers")

from placer.errors import PlacerError
from placer.models.config import shape_of_config
from placer.tracer.dims import expert_dims
from placer.tracer.layers import choose_group
from placer.tracer.structure import find_stacks
from tests.tracer.families import CAUSAL, NUM_EXPERTS, Family

FAST = ("DeepseekV3", "GptOss", "Llama4", "Mixtral", "Qwen3Moe")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CAUSAL]
)
def test_the_configuration_gives_what_the_built_model_has(name):
    model = Family(name, f"{name}ForCausalLM").build()
    stacks = [
        stack
        for stack in find_stacks(model)
        if stack.num_experts in (NUM_EXPERTS, 16) and "shared" not in stack.name
    ]
    group, _ = choose_group([stack.name for stack in stacks], None)
    chosen = [stack for stack in stacks if stack.name in group.names]
    dims = expert_dims(model, [stack for stack in chosen if stack.block == chosen[0].block])
    try:
        shape = shape_of_config(copy.deepcopy(model.config), name, "")
    except PlacerError as error:
        pytest.fail(f"{error.message}: {error.hint}")
    assert shape.num_experts == chosen[0].num_experts
    assert shape.num_moe_layers == len({stack.block for stack in chosen})
    assert shape.hidden_size == dims.hidden_size
    assert shape.expert_params * 4 == dims.expert_bytes  # the built one is in float32
    assert shape.expert_flops_per_token == dims.expert_flops_per_token
    own = sum(p.numel() for stack in chosen for p in stack.module.parameters())
    assert shape.other_params == sum(p.numel() for p in model.parameters()) - own
    assert shape.kv_bytes_per_token is None or shape.kv_bytes_per_token >= 0

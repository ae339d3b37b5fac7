"""Every other family, against the ids that its experts were seen to work on.

With experts computed one by one, transformers spreads the ids that it works on with `one_hot`;
watching that function is a way to the truth that shares nothing with the tracer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from placer.tracer import capture

from .families import CAUSAL, NUM_EXPERTS, SLOW, Family
from .observe import Steps, inputs_of, num_hooks


class OneHot(TorchFunctionMode):
    """Collects what `one_hot` is applied to: [N, K] ids, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[NDArray[np.int64]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") == "one_hot":
            self.ids.append(args[0].clone().numpy())
        return function(*args, **(kwargs or {}))


def fill(model: Any) -> None:
    """Give random values to the tables and biases that are empty in a fresh model."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            order = torch.rand(len(buffer), NUM_EXPERTS, generator=generator).argsort(dim=1)
            buffer.copy_(order[:, : buffer.shape[1]])
        elif name.endswith("balancing_biases"):
            buffer[-1] = 0.2  # the class that skips the layer
        elif "correction_bias" in name or name.endswith("expert_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


def closed_up(ids: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Sorted ids of each token, with -1 for those that are no experts."""
    return np.sort(np.where(ids >= num_experts, -1, ids), axis=-1)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CAUSAL]
)
def test_trace_is_what_the_experts_worked_on(name: str) -> None:
    model = Family(name, f"{name}ForCausalLM").build()
    fill(model)
    model.set_experts_implementation("eager")
    steps = Steps([3, 5], width=5, num_steps=1, side="left")
    plain = steps.run(model)
    with capture(model, weights=True) as tracer, OneHot() as truth:
        traced = steps.run(model)
    trace = tracer.trace()
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    assert num_hooks(model) == 0
    assert trace.num_experts == NUM_EXPERTS
    assert trace.layer_ids.tolist() == sorted(set(trace.layer_ids.tolist()))
    for column, values in steps.expected().items():
        assert getattr(trace, column).tolist() == values.tolist(), column
    num_layers = trace.num_layers
    assert len(truth.ids) == 2 * num_layers
    real = steps.mask.numpy().reshape(-1).astype(bool)
    assert trace.weights is not None
    for i in range(num_layers):
        first, second = truth.ids[i], truth.ids[num_layers + i]
        expected = closed_up(np.concatenate([first[real], second]), NUM_EXPERTS)
        if name == "Zaya":  # a skipped layer is computed by expert 0 with weight 0
            is_skipped = trace.experts[:, i] < 0
            assert (expected[is_skipped] == 0).all()
            expected = np.where(is_skipped, -1, expected)
        found = np.sort(trace.experts[:, i], axis=-1)
        assert np.array_equal(found, expected), f"layer {trace.layer_ids[i]}"
    if name in ("Zaya", "LongcatFlash"):
        assert (trace.experts < 0).any()
        assert (trace.experts >= 0).any()
    assert trace.model.expert_bytes
    assert trace.model.expert_flops_per_token


def test_doge_looks_experts_up_in_tables() -> None:
    model = Family("Doge", "DogeForCausalLM").build()
    seen: dict[int, list[Any]] = {layer: [] for layer in range(4)}
    for layer, calls in seen.items():
        table = model.model.layers[layer].mlp.up_embed
        table.register_forward_pre_hook(
            lambda module, args, calls=calls: calls.append(args[0].clone().numpy())
        )
    steps = Steps([4, 4], width=4, num_steps=1, side="left")
    with capture(model) as tracer:
        steps.run(model)
    trace = tracer.trace()
    assert trace.num_experts == 16
    for i in range(4):
        assert np.array_equal(trace.experts[:, i], np.concatenate(seen[i]))


def switch() -> Any:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=24,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        expert_capacity=2,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def nllb() -> Any:
    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=4,
        expert_capacity=64,
        max_position_embeddings=64,
        decoder_start_token_id=2,
    )
    return transformers.NllbMoeForConditionalGeneration(config).eval()


PROMPT = {
    "input_ids": torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
}
REAL = PROMPT["attention_mask"].numpy().reshape(-1).astype(bool)


def test_switch_transformers_top_1_with_capacity() -> None:
    model = switch()
    path = "encoder.block.{}.layer.1.mlp.router"
    modules = {layer: model.get_submodule(path.format(layer)) for layer in (1, 3)}
    with inputs_of(modules) as seen, capture(model, routers="encoder", weights=True) as tracer:
        model.generate(**PROMPT, max_new_tokens=4, do_sample=False)
    trace = tracer.trace()
    assert trace.phase.tolist() == [0] * 8
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    for i, layer in enumerate((1, 3)):
        logits = seen[layer][0] @ modules[layer].classifier.weight.detach().double().numpy().T
        best = logits.argmax(axis=1).reshape(2, 5)
        for row in range(2):  # the third token that wants an expert does not get it
            taken: dict[int, int] = {}
            for column in range(5):
                taken[best[row, column]] = taken.get(best[row, column], 0) + 1
                if taken[best[row, column]] > 2:
                    best[row, column] = -1
        assert trace.experts[:, i, 0].tolist() == best.reshape(-1)[REAL].tolist()


@pytest.mark.parametrize("build", [switch, nllb])
def test_encoder_and_decoder_are_traced_apart(build: Any) -> None:
    model = build()
    with capture(model) as tracer:
        model.generate(**PROMPT, max_new_tokens=4, do_sample=False, eos_token_id=None)
    trace = tracer.trace()
    assert trace.layer_ids.tolist() == [1, 3]
    assert "left out" in tracer.notes[0]
    assert "encoder" in tracer.notes[0]
    assert trace.request.tolist() == [0, 1] * 4
    assert trace.position.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert trace.phase.tolist() == [0, 0] + [1] * 6
    assert num_hooks(model) == 0


def test_nllb_top_2() -> None:
    model = nllb()
    path = "model.encoder.layers.{}.ffn.router"
    modules = {layer: model.get_submodule(path.format(layer)) for layer in (1, 3)}
    with inputs_of(modules) as seen, capture(model, routers="encoder") as tracer:
        model.generate(**PROMPT, max_new_tokens=2, do_sample=False)
    trace = tracer.trace()
    for i, layer in enumerate((1, 3)):
        logits = seen[layer][0] @ modules[layer].classifier.weight.detach().double().numpy().T
        expected = np.argsort(-logits, axis=1)[REAL, :2]
        assert trace.experts[:, i].tolist() == expected.tolist()


VISION = {
    "Qwen3VLMoe": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 16,
            "num_heads": 2,
            "deepstack_visual_indexes": [0],
        }
    },
    "Llama4": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_text_part_of_a_vision_language_model(name: str) -> None:
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    text_class = model_class.config_class.sub_configs["text_config"]
    text = Family(name, "").values(text_class)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(text_config=text, **VISION[name])).eval()
    with capture(model) as tracer:
        model.generate(**PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=None)
    trace = tracer.trace()
    assert trace.layer_ids.tolist() == [0, 1, 2, 3]
    assert sorted(trace.request.tolist()) == [0] * 5 + [1] * 7


@pytest.mark.slow
def test_no_family_of_the_installed_transformers_is_forgotten() -> None:
    """Every causal language model whose source hands ids to experts is in one of these tests."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    tested = {f"{name}ForCausalLM" for name in CAUSAL} | {
        "DogeForCausalLM",
        "JetMoeForCausalLM",
        "Llama4ForCausalLM",
    }
    forgotten = set()
    for model_class in set(mapping.values()):
        found = getattr(transformers, model_class, None)
        if found is None or model_class in tested:
            continue
        source = Path(__import__(found.__module__, fromlist=["x"]).__file__).read_text()
        own = re.findall(r"self\.experts\(.*(?:ind|selected|top_k)", source)
        if own and "ForCausalLM" in model_class:
            forgotten.add(model_class)
    assert forgotten == set()

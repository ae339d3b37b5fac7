"""Each named family, on a small model of its real class, against its published routing formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from placer.tracer import capture

from . import routers
from .families import Family
from .observe import Steps, inputs_of, num_hooks


@dataclass(frozen=True)
class Case:
    """A family, where its routers are, and its formula."""

    name: str
    router: str
    formula: routers.Formula
    layers: tuple[int, ...] = (0, 1, 2, 3)
    config: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("Mixtral", "model.layers.{}.mlp.gate", routers.mixtral),
    Case("Qwen2Moe", "model.layers.{}.mlp.gate", routers.softmax_then_top),
    Case(
        "Qwen3Moe",
        "model.layers.{}.mlp.gate",
        routers.softmax_then_top,
        layers=(1, 3),
        config={"decoder_sparse_step": 2},
    ),
    Case("Olmoe", "model.layers.{}.mlp.gate", routers.softmax_then_top),
    Case("DeepseekV2", "model.layers.{}.mlp.gate", routers.deepseek_v2, layers=(1, 2, 3)),
    Case("DeepseekV3", "model.layers.{}.mlp.gate", routers.deepseek_v3, layers=(1, 2, 3)),
    Case("GptOss", "model.layers.{}.mlp.router", routers.gpt_oss),
    Case("Phimoe", "model.layers.{}.mlp.router", routers.phimoe),
    Case("GraniteMoe", "model.layers.{}.block_sparse_moe.router", routers.granite),
    Case("JetMoe", "model.layers.{}.mlp.router", routers.jetmoe),
    Case(
        "Llama4",
        "model.layers.{}.feed_forward.router",
        routers.llama4,
        layers=(1, 3),
        config={"interleave_moe_layer_step": 2},
    ),
]


def build(case: Case) -> Any:
    model = Family(case.name, f"{case.name}ForCausalLM").build(**case.config)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():  # zero in a fresh model, which would hide its part
        if "correction_bias" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("router.bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trace_is_what_the_published_formula_gives(case: Case, side: str) -> None:
    model = build(case)
    steps = Steps([3, 6, 1], width=6, num_steps=3, side=side)
    plain = steps.run(model)
    modules = {layer: model.get_submodule(case.router.format(layer)) for layer in case.layers}

    with inputs_of(modules) as seen, capture(model, weights=True) as tracer:
        traced = steps.run(model)
    trace = tracer.trace()

    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    assert num_hooks(model) == 0
    assert trace.layer_ids.tolist() == list(case.layers)
    assert trace.num_experts == 8
    for name, values in steps.expected().items():
        assert getattr(trace, name).tolist() == values.tolist(), name
    real = [steps.mask.numpy().reshape(-1).astype(bool)] + [np.ones(3, bool)] * 3
    for i, layer in enumerate(case.layers):
        router = modules[layer]
        hidden = np.concatenate([h[r] for h, r in zip(seen[layer], real, strict=True)])
        ids, weights = case.formula(router, hidden)
        order = np.argsort(-weights, axis=1, kind="stable")
        assert trace.weights is not None
        assert trace.experts[:, i].tolist() == np.take_along_axis(ids, order, 1).tolist()
        expected = np.take_along_axis(weights, order, 1)
        np.testing.assert_allclose(trace.weights[:, i], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "DeepseekV3"])
def test_trace_does_not_depend_on_how_experts_are_computed(name: str, implementation: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = build(case)
    steps = Steps([4, 2], width=4, num_steps=2, side="left")
    model.set_experts_implementation(implementation)
    modules = {layer: model.get_submodule(case.router.format(layer)) for layer in case.layers}
    with inputs_of(modules) as seen, capture(model) as tracer:
        steps.run(model)
    trace = tracer.trace()
    real = [steps.mask.numpy().reshape(-1).astype(bool)] + [np.ones(2, bool)] * 2
    for i, layer in enumerate(case.layers):
        hidden = np.concatenate([h[r] for h, r in zip(seen[layer], real, strict=True)])
        ids, _ = case.formula(modules[layer], hidden)
        assert np.array_equal(np.sort(trace.experts[:, i], 1), np.sort(ids, 1))


def test_jetmoe_attention_experts_are_left_out_and_can_be_chosen() -> None:
    case = next(case for case in CASES if case.name == "JetMoe")
    model = build(case)
    steps = Steps([4, 2], width=4, num_steps=1, side="left")
    with capture(model) as tracer:
        steps.run(model)
    assert [note for note in tracer.notes if "self_attention" in note]
    path = "model.layers.{}.self_attention.experts.router"
    modules = {layer: model.get_submodule(path.format(layer)) for layer in case.layers}
    with inputs_of(modules) as seen, capture(model, routers="self_attention") as tracer:
        steps.run(model)
    trace = tracer.trace()
    real = [steps.mask.numpy().reshape(-1).astype(bool), np.ones(2, bool)]
    for i, layer in enumerate(case.layers):
        hidden = np.concatenate([h[r] for h, r in zip(seen[layer], real, strict=True)])
        ids, _ = routers.jetmoe(modules[layer], hidden)
        assert np.array_equal(np.sort(trace.experts[:, i], 1), np.sort(ids, 1))


def test_bfloat16_model_gives_its_own_choice() -> None:
    model = build(CASES[2]).to(torch.bfloat16)
    chosen: dict[int, list[Any]] = {1: [], 3: []}
    handles = [
        model.model.layers[layer].mlp.gate.register_forward_hook(
            lambda module, args, output, layer=layer: chosen[layer].append(output[2])
        )
        for layer in chosen
    ]
    steps = Steps([4, 4], width=4, num_steps=2, side="left")
    with capture(model, weights=True) as tracer:
        steps.run(model)
    for handle in handles:
        handle.remove()
    trace = tracer.trace()
    for i, layer in enumerate(chosen):
        ids = torch.cat(chosen[layer]).numpy()
        assert np.array_equal(np.sort(trace.experts[:, i], 1), np.sort(ids, 1))


def test_dimensions_come_from_the_real_weights() -> None:
    model = build(CASES[0])
    with capture(model) as tracer:
        Steps([2], width=2, num_steps=0, side="left").run(model)
    dims = tracer.trace().model
    assert dims.hidden_size == 32
    assert dims.expert_bytes == 3 * 32 * 24 * 4
    assert dims.expert_flops_per_token == 2 * 3 * 32 * 24

"""On a GPU: the same tokens, and no waiting for the device on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from placer.tracer import capture

from .families import Family
from .observe import Steps
from .test_plain_modules import Gate, H, Layers

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Experts(nn.Module):
    """Nothing in here waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, H, H))

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every = torch.einsum("nh,ehi->nei", hidden, self.up)
        picked = every.gather(1, ids[:, :, None].expand(-1, -1, H))
        return (picked * weights[:, :, None]).sum(dim=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = Experts()

    def forward(self, hidden: Tensor) -> Tensor:
        ids, weights, _ = self.gate(hidden)
        found: Tensor = self.experts(hidden.reshape(-1, H), ids, weights).view_as(hidden)
        return found


def test_nothing_waits_for_the_device_after_the_first_pass() -> None:
    model = Layers(Block(), Block()).cuda()
    batches = [torch.randn(2, 3, H, device="cuda") for _ in range(80)]
    with capture(model, weights=True) as tracer, torch.no_grad():
        model(batches[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[1:]:
                model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert tracer.trace().num_tokens == 80 * 6


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "JetMoe", "Llama4", "DeepseekV3"])
def test_ids_are_those_of_the_router(name: str) -> None:
    model = Family(name, f"{name}ForCausalLM").build().cuda()
    steps = Steps([3, 6], width=6, num_steps=3, side="left")
    for field in ("tokens", "mask", "next"):
        setattr(steps, field, getattr(steps, field).cuda())
    with torch.no_grad():
        plain = steps.run(model)
    seen: list[Any] = []
    with capture(model, weights=True) as tracer:
        assert tracer.layout is None
        traced = steps.run(model)
        layout = tracer.layout
        assert layout is not None
        site = layout.sites[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(site.reader(args, kwargs, output)[0].reshape(-1, layout.top_k).cpu().numpy())

    handle = site.module.register_forward_hook(note, with_kwargs=True)
    steps.run(model)
    handle.remove()
    real = steps.mask.cpu().numpy().reshape(-1).astype(bool)
    expected = np.concatenate([seen[0][real], *seen[1:]])
    found = tracer.trace().experts[:, 0]
    assert np.array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))

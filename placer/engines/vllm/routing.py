"""Reading the routing inside vLLM's forward pass, on the device.

Every router computes gate weights and logical expert ids in `_compute_routing`
(`vllm/model_executor/layers/fused_moe/router/base_router.py`, vLLM 0.32), before expert-parallel
load balancing maps them to slots. What it returns is copied into buffers that stay where they
are, by an operator of its own: torch.compile keeps the operator as it is, and CUDA graphs replay
its copies.

Shapes: T tokens of a step, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from placer.errors import UsageError

_OPERATOR = "placer::record_routing"
_library: Any = None  # its methods have no types
_buffers: RoutingBuffers | None = None


@dataclass(frozen=True)
class MoeLayer:
    """A layer of experts of the loaded model.

    Attributes:
        layer_id: its real number.
        runner: vLLM's module around the router and the experts.
        router: vLLM's router.
    """

    layer_id: int
    runner: Any
    router: Any


def moe_layers(model: torch.nn.Module) -> list[MoeLayer]:
    """The layers of experts whose routing can be read, in the order of their numbers.

    Raises:
        UsageError: there are none, or a kernel chooses the experts out of sight.
    """
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    modules: Iterator[Any] = model.modules()
    found = [
        MoeLayer(int(module.layer_id), module, module.router)
        for module in modules
        if isinstance(getattr(module, "router", None), BaseRouter)
    ]
    if not found:
        raise UsageError("vLLM has loaded a model without routers of experts: nothing to trace")
    hidden = [layer.layer_id for layer in found if layer.runner.is_monolithic]
    if hidden:
        raise UsageError(
            f"the kernel of layers {hidden} chooses the experts out of sight",
            "serve with another --moe-backend (triton) while you trace",
        )
    return sorted(found, key=lambda layer: layer.layer_id)


class RoutingBuffers:
    """What the routers chose in the current step.

    Attributes:
        experts: [max T, L, K] int32 on the device.
        weights: [max T, L, K] float32 on the device.
        seen: per layer, whether its router was ever heard.
        active: whether they are wanted; CUDA graphs go on writing into them when they are not.
        error: what went wrong while they were filled, if anything did.
    """

    def __init__(
        self,
        layers: list[MoeLayer],
        *,
        max_tokens: int,
        top_k: int,
        device: torch.device,
        local_rows: Callable[[int], slice],
    ) -> None:
        shape = (max_tokens, len(layers), top_k)
        self.experts = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.weights = torch.zeros(shape, dtype=torch.float32, device=device)
        self.seen = [False] * len(layers)
        self.active = True
        self.error: Exception | None = None
        self._local_rows = local_rows

    def record(self, weights: torch.Tensor, experts: torch.Tensor, layer: int) -> None:
        """Keep the rows of one layer that belong to this rank."""
        self.seen[layer] = True
        here = self._local_rows(len(experts))
        rows = min(here.stop - here.start, len(self.experts))
        here = slice(here.start, here.start + rows)
        top_k = experts.shape[1]
        self.experts[:rows, layer, :top_k].copy_(experts[here])
        self.weights[:rows, layer, :top_k].copy_(weights[here])

    def snapshot(self, num_tokens: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows, the expert of the highest weight first.

        Ids that are no expert of the model (zero experts) become -1.

        Returns:
            [T, L, K] int32 experts and float32 weights, both new tensors.
        """
        experts = self.experts[:num_tokens]
        weights = self.weights[:num_tokens]
        used = (experts >= 0) & (experts < num_experts)
        order = weights.masked_fill(~used, float("-inf")).argsort(
            dim=-1, descending=True, stable=True
        )
        return (
            experts.masked_fill(~used, -1).gather(-1, order),
            weights.masked_fill(~used, 0.0).gather(-1, order),
        )


def watch_routers(layers: list[MoeLayer], buffers: RoutingBuffers) -> None:
    """Let every router pass what it chose through the operator that records it."""
    global _buffers
    _define_operator()
    _buffers = buffers
    for number, layer in enumerate(layers):
        layer.router._compute_routing = _recording(layer.router._compute_routing, number)


def _recording(compute: Callable[..., Any], layer: int) -> Callable[..., Any]:
    def compute_routing(*args: Any, **kwargs: Any) -> Any:
        weights, experts = compute(*args, **kwargs)
        return weights, torch.ops.placer.record_routing(weights, experts, layer)

    return compute_routing


def _define_operator() -> None:
    """The operator gives back the ids that it got: the experts' work depends on its result, so
    that no compiler may leave it out."""
    global _library
    if _library is not None:
        return
    make_library: Any = torch.library.Library
    _library = make_library("placer", "DEF")
    _library.define("record_routing(Tensor weights, Tensor experts, int layer) -> Tensor")
    _library.impl("record_routing", _record_routing, "CompositeExplicitAutograd")
    torch.library.register_fake(_OPERATOR, _same_shape, lib=_library)


def _record_routing(weights: torch.Tensor, experts: torch.Tensor, layer: int) -> torch.Tensor:
    if _buffers is not None and _buffers.active:
        try:
            _buffers.record(weights, experts, layer)
        except Exception as error:  # the model has to go on
            _buffers.active, _buffers.error = False, error
    return experts.clone()


def _same_shape(weights: torch.Tensor, experts: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(experts)

"""What one small pass through a rank's model tells about its MoE layers.

Coherent dispatch lets tokens leave a decoder layer between its attention and its experts. That
needs to know what is not the same in every family: the module that normalises the residual
stream for the experts, that the layer's output is residual stream + the block's output, and the
shapes of keys and values in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from placer.errors import PlacerError
from placer.runtime.layout import ModelLayout, MoeLayer

_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")  # of transformers' cache_utils
_HINT = "use --dispatch alltoall or allgather for this model"


@dataclass(frozen=True, eq=False)
class Halves:
    """The parts of a decoder layer around its experts.

    Attributes:
        norm: [n, D] residual stream -> what the block is given.
        block: router, experts, shared experts.
    """

    norm: nn.Module
    block: nn.Module


@dataclass(eq=False)
class _Seen:
    """What happened in one decoder layer."""

    calls: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    given: Tensor | None = None  # to the block
    made: Tensor | None = None  # by the block
    result: Any = None  # of the layer


@dataclass(frozen=True, eq=False)
class Probe:
    """Findings of the pass.

    Attributes:
        top_k: K, experts per token.
    """

    top_k: int
    _model: Any
    _layers: tuple[MoeLayer, ...]
    _seen: list[_Seen]
    _cache: Any

    def halves(self) -> list[Halves]:
        """[L] the halves of every MoE layer.

        Raises:
            PlacerError: a layer is built otherwise; other dispatch models do not mind.
        """
        return [self._halves(*pair) for pair in zip(self._layers, self._seen, strict=True)]

    def cache_shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(heads, width) of a token's keys and of its values, for every decoder layer.

        Raises:
            PlacerError: a layer caches something else.
        """
        shapes = []
        for i, layer in enumerate(getattr(self._cache, "layers", [])):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            tensors = [t for t in (keys, values) if isinstance(t, Tensor) and t.dim() == 4]
            if len(tensors) < 2 or type(layer).__name__ not in _PLAIN_LAYERS:
                raise PlacerError(
                    f"decoder layer {i} caches something else than keys and values, which cannot "
                    "be kept on every rank (coherent dispatch)", _HINT,
                )  # fmt: skip
            key, value = ((t.shape[1], t.shape[3]) for t in tensors)
            shapes.append((key, value))
        if not shapes:
            raise PlacerError("the model made no cache of keys and values", _HINT)
        return shapes

    def _halves(self, layer: MoeLayer, seen: _Seen) -> Halves:
        found = next((call for call in seen.calls if call[2] is seen.given), None)
        if found is None:
            raise PlacerError(
                f"{layer.layer}: no module between the residual stream and {layer.block} was "
                "found, so tokens cannot move there (coherent dispatch)", _HINT,
            )  # fmt: skip
        norm, residual, _ = found
        assert seen.made is not None
        if not isinstance(seen.result, Tensor) or not torch.equal(
            residual + seen.made, seen.result
        ):
            raise PlacerError(
                f"{layer.layer}: its output is not residual stream + output of {layer.block}, so "
                "tokens cannot move there (coherent dispatch)", _HINT,
            )  # fmt: skip
        return Halves(norm, self._model.get_submodule(layer.block))


Experts = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def probe(
    model: Any,
    layout: ModelLayout,
    swap: Callable[[Experts], Experts],
    device: torch.device,
) -> Probe:
    """Run one token through the model, with experts that return a ramp.

    Args:
        model: with experts' slots.
        layout: of the model.
        swap: takes what the slots shall call, returns what they called before.
        device: of the model.
    """
    seen = [_Seen() for _ in layout.layers]
    top_k: list[int] = []

    def ramp(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        top_k.append(ids.shape[-1])
        steps = torch.linspace(1, 2, hidden.numel(), device=hidden.device)
        return steps.to(hidden.dtype).view_as(hidden)

    handles = []
    for layer, notes in zip(layout.layers, seen, strict=True):
        module, block = model.get_submodule(layer.layer), model.get_submodule(layer.block)
        handles += [c.register_forward_hook(_keep(notes)) for c in module.children()]
        handles.append(block.register_forward_hook(_keep_block(notes)))
        handles.append(module.register_forward_hook(_keep_result(notes)))
    before = swap(ramp)
    try:
        with torch.no_grad():
            output = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device),
                           use_cache=True)  # fmt: skip
    finally:
        swap(before)
        for handle in handles:
            handle.remove()
    return Probe(top_k[0], model, layout.layers, seen, output.past_key_values)


def first_tensor(output: Any) -> Any:
    """What a module returned, or the first of several things."""
    return output[0] if isinstance(output, tuple) else output


def _keep(notes: _Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            notes.calls.append((module, args[0], output))

    return hook


def _keep_block(notes: _Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        notes.given, notes.made = args[0], first_tensor(output)

    return hook


def _keep_result(notes: _Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        notes.result = output

    return hook

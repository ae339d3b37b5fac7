"""Loading a rank's share of a model: all that is not an expert, and the experts of its slots."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from placer.errors import BadFileError, PlacerError
from placer.placement import Placement
from placer.runtime.layout import ModelLayout
from placer.runtime.mapping import Mapping
from placer.runtime.memory import LoadMemory, PeakMemory, tensor_bytes


def local_slots(placement: Placement, layer: int, rank: int) -> list[tuple[int, int]]:
    """(slot, expert) of each filled slot of a rank in a layer, in the order of slots."""
    width = placement.slots_per_rank
    row = placement.physical_to_logical[layer, rank * width : (rank + 1) * width]
    return [(rank * width + i, int(expert)) for i, expert in enumerate(row) if expert >= 0]


def share_bytes(layout: ModelLayout, placement: Placement, rank: int) -> int:
    """Bytes of the weights that the plan gives a rank."""
    filled = sum(len(local_slots(placement, layer, rank)) for layer in range(placement.num_layers))
    return layout.other_bytes + filled * layout.expert_bytes


def load_share(
    layout: ModelLayout,
    mapping: Mapping,
    placement: Placement,
    rank: int,
    device: torch.device,
    others: Any = None,
) -> tuple[Any, LoadMemory]:
    """The model with a rank's experts only.

    Every experts' module holds the experts of the rank's filled slots, in the order of slots, as
    its experts 0, 1, ...; a rank without any in a layer holds none.

    Args:
        layout: of the model.
        mapping: reads the checkpoint.
        placement: where the experts are.
        rank: this rank.
        device: where weights go.
        others: a model that was loaded before; what is not an expert is taken from it, not read.

    Returns:
        The model, in evaluation mode, and what memory it took.
    """
    model = copy.deepcopy(layout.model)
    _warm_up(layout, mapping, placement, device)
    peak = PeakMemory()
    for number, layer in enumerate(layout.layers):
        experts = [expert for _, expert in local_slots(placement, number, rank)]
        _load_experts(model.get_submodule(layer.experts), layer.experts, experts, layout, mapping,
                      device)  # fmt: skip
    apart = _paths_of_experts(layout)
    if others is None:
        _load_others(model, apart, mapping, device)
    else:
        _take_others(model, apart, others)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise BadFileError(f"{mapping.checkpoint.folder} lacks {left[0]}")
    _make_buffers(model, device)
    peak_bytes = peak.above_start()
    tensors = [*model.parameters(), *model.buffers()]
    share = share_bytes(layout, placement, rank)
    return model, LoadMemory(share, tensor_bytes(tensors), peak_bytes)


def _warm_up(
    layout: ModelLayout, mapping: Mapping, placement: Placement, device: torch.device
) -> None:
    """Do once, with one expert and the smallest tensors of the rest, what loading does.

    So that the pages of the code that loads are not taken for the model's.
    """
    skeleton = copy.deepcopy(layout.model)
    layer = layout.layers[0]
    local_slots(placement, 0, 0)
    _load_experts(
        skeleton.get_submodule(layer.experts), layer.experts, [0], layout, mapping, device
    )
    others = [
        (meta.numel(), name, meta.dim())
        for name, meta in skeleton.state_dict().items()
        if not name.startswith(_paths_of_experts(layout)) and mapping.has(name)
    ]
    smallest = {dim: name for _, name, dim in sorted(others, reverse=True)}  # by number of axes
    for name in smallest.values():
        _load_other(skeleton, name, mapping, device)
    skeleton.tie_weights()
    _make_buffers(skeleton, device)


def _paths_of_experts(layout: ModelLayout) -> tuple[str, ...]:
    """What the names of all experts' parameters begin with."""
    return tuple(f"{layer.experts}." for layer in layout.layers)


def _load_experts(
    module: nn.Module,
    path: str,
    experts: list[int],
    layout: ModelLayout,
    mapping: Mapping,
    device: torch.device,
) -> None:
    for name, shape in layout.expert_parameters.items():
        held = torch.empty((len(experts), *shape), dtype=layout.dtype, device=device)
        for i, expert in enumerate(experts):
            held[i] = mapping.read_expert(f"{path}.{name}", expert, layout.num_experts, shape)[0]
        setattr(module, name, _frozen(held))
    # the module's own forward counts by this
    module.num_experts = len(experts)  # type: ignore[assignment]


def _load_others(
    model: Any, apart: tuple[str, ...], mapping: Mapping, device: torch.device
) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name in list(model.state_dict()):
        if name.startswith(apart):
            continue
        if name in tied and not mapping.has(name):
            continue  # tied later
        _load_other(model, name, mapping, device)


def _load_other(model: Any, name: str, mapping: Mapping, device: torch.device) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    is_buffer = key in module._buffers
    meta = module._buffers[key] if is_buffer else module._parameters[key]
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    is_strict = bool(strict & set(name.split("."))) and meta.dtype.is_floating_point
    dtype = torch.float32 if is_strict else meta.dtype
    held = torch.empty(meta.shape, dtype=dtype, device=device)
    mapping.read_into(name, held)
    if is_buffer:
        module._buffers[key] = _initialised(held)
    else:
        setattr(module, key, _frozen(held))


def _take_others(model: Any, apart: tuple[str, ...], loaded: Any) -> None:
    """Have a model use the very tensors of another one."""
    for path, module in loaded.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                name = f"{path}.{key}" if path else key
                if tensor is None or name.startswith(apart):
                    continue
                ours = model.get_submodule(path)
                own = ours._buffers if held is module._buffers else ours._parameters
                own[key] = tensor


def _make_buffers(model: Any, device: torch.device) -> None:
    """Compute what no checkpoint holds, such as rotary frequencies, as from_pretrained does."""
    made: list[tuple[str, nn.Module, str]] = []
    for path, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            meta = module._buffers[key]
            if meta is not None and meta.is_meta:
                value = torch.empty_like(meta, device="cpu")
                value.fill_(torch.nan if meta.dtype.is_floating_point else 0)
                module._buffers[key] = value
                made.append((f"{path}.{key}", module, key))
    model.initialize_weights()
    for name, module, key in made:
        held = module._buffers[key]
        assert held is not None
        if not held.dtype.is_floating_point or bool(held.isnan().any()):
            raise PlacerError(f"the buffer {name} cannot be computed without a full load")
        module._buffers[key] = held.to(device)


def _frozen(tensor: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    _initialised(parameter)
    return parameter


def _initialised(tensor: Any) -> Any:
    """Mark a tensor as loaded, so that transformers does not initialise it anew."""
    tensor._is_hf_initialized = True
    return tensor

"""`ModelDims` of a model, from the real sizes of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from placer.trace.model import ModelDims
from placer.tracer.structure import Stack


def expert_dims(model: nn.Module, stacks: Sequence[Stack]) -> ModelDims:
    """Dimensions of one expert of one layer.

    Bytes are those of its weights as they are stored; floating-point operations are two for each
    weight of its matrices, and unknown where a quantiser packed them.

    Args:
        model: for its name and hidden size.
        stacks: the stacks of one block.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    name = getattr(config, "_name_or_path", "") or None
    hidden_size = getattr(text, "hidden_size", None) or getattr(text, "d_model", None)
    if not isinstance(hidden_size, int):
        hidden_size = None
    num_bytes, num_weights, is_packed = 0, 0, False
    for stack in stacks:
        for parameter, count, is_matrix in _expert_parameters(stack):
            num_bytes += parameter.numel() * parameter.element_size() // count
            if is_matrix:
                num_weights += parameter.numel() // count
                is_packed |= not parameter.dtype.is_floating_point
    return ModelDims(
        name=name,
        hidden_size=hidden_size,
        expert_bytes=num_bytes or None,
        expert_flops_per_token=2.0 * num_weights if num_weights and not is_packed else None,
    )


def _expert_parameters(stack: Stack) -> list[tuple[Tensor, int, bool]]:
    """Parameters of a stack, how many experts share each, and whether it is a matrix."""
    found: list[tuple[Tensor, int, bool]] = []
    for name, parameter in stack.module.named_parameters():
        if stack.is_table and parameter.shape[0] != stack.num_experts:
            continue
        if isinstance(stack.module, nn.ModuleList | nn.ModuleDict):
            count, is_matrix = stack.num_experts, parameter.dim() >= 2
        elif parameter.dim() >= 3:
            count, is_matrix = parameter.shape[0], True
        else:
            count = stack.num_experts
            if parameter.shape[0] % count:
                continue  # not split by expert
            is_matrix = parameter.dim() == 2 and (parameter.shape[0] > count or stack.is_table)
        found.append((parameter, count, is_matrix and "scale" not in name))
    return found

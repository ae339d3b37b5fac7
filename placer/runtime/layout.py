"""Where the MoE layers of a model are, and how large: looked up on a model without weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from placer.errors import BadFileError, PlacerError, UsageError
from placer.tracer.layers import choose_group
from placer.tracer.structure import find_stacks, parent_of

_HINT = "is it complete, and a model that this version of transformers knows?"


@dataclass(frozen=True)
class MoeLayer:
    """Paths of one MoE layer's modules.

    Attributes:
        layer_id: the model's own number of the layer.
        layer: the decoder layer.
        block: the module around router and experts.
        experts: the module that holds the experts, with parameters [E, ...].
    """

    layer_id: int
    layer: str
    block: str
    experts: str


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """A model on the meta device, and what is known of its experts.

    Attributes:
        model: the model; its parameters have shapes and no memory.
        dtype: type that weights are held in.
        layers: the L MoE layers, by increasing number.
        all_layers: path of the list of all decoder layers, dense ones too.
        num_experts: E.
        expert_parameters: name within the experts' module -> shape of one expert's share.
        expert_bytes: of one expert of one layer.
        other_bytes: everything that every rank holds.
    """

    model: Any
    dtype: torch.dtype
    layers: tuple[MoeLayer, ...]
    all_layers: str
    num_experts: int
    expert_parameters: Mapping[str, tuple[int, ...]]
    expert_bytes: int
    other_bytes: int

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)


def read_layout(folder: Path, dtype: str = "auto") -> ModelLayout:
    """Build the model of a folder's config.json without memory for its weights.

    Args:
        folder: of a Hugging Face checkpoint.
        dtype: "auto" (as stored), float32, bfloat16 or float16.

    Raises:
        BadFileError: the configuration is missing or damaged.
        PlacerError: the model is of a kind that the runtime cannot split.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise BadFileError(
            f"{folder} holds no config.json", "give the folder of a Hugging Face checkpoint"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise BadFileError(f"{folder / 'config.json'} cannot be used: {first}", _HINT) from None
    if getattr(config, "quantization_config", None) is not None:
        raise PlacerError(
            f"{folder} holds quantised weights, which the runtime does not read",
            "dequantise the checkpoint and save it in bfloat16",
        )
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"dtype is {dtype!r}", "use auto, float32, bfloat16 or float16")
    stored = getattr(config.get_text_config(), "dtype", None) or config.dtype or torch.float32
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise BadFileError(f"{folder / 'config.json'} describes no model: {first}", _HINT) from None
    return layout_of(model.eval(), wanted)


def layout_of(model: Any, dtype: torch.dtype) -> ModelLayout:
    """Find the MoE layers of a model by the shapes of its parameters."""
    what = type(model).__name__
    # in a dense model, the list of decoder layers is the only list of like modules
    stacks = {s.name: s for s in find_stacks(model) if any(map(str.isdigit, s.name.split(".")))}
    if not stacks:
        raise PlacerError(
            f"{what} has no mixture-of-experts layers that could be found",
            "a dense model has no experts to place",
        )
    group, _ = choose_group(list(stacks), None)
    chosen = [stacks[name] for name in group.names]
    for stack in chosen:
        if not stack.is_callable or not _takes_routing(stack.module):
            raise PlacerError(
                f"{what}: {stack.name} ({type(stack.module).__name__}) is not an experts module "
                "that is called with hidden states, expert ids and weights",
                "the runtime splits models whose experts are fused, as in transformers 5",
            )
    counts = sorted({stack.num_experts for stack in chosen})
    if len(counts) > 1:
        raise PlacerError(f"{what}: layers have {counts} experts, expected one number")
    parameters = _expert_parameters(chosen[0].module, counts[0], chosen[0].name)
    for stack in chosen[1:]:
        if _expert_parameters(stack.module, counts[0], stack.name) != parameters:
            raise PlacerError(f"{what}: the experts of {stack.name} differ from the first layer's")
    size = torch.empty((), dtype=dtype).element_size()
    expert_bytes = sum(_numel(shape) for shape in parameters.values()) * size
    in_stacks = {
        id(parameter) for stack in chosen for parameter in stack.module.parameters(recurse=False)
    }
    others = [*model.parameters(), *model.buffers()]
    other_bytes = sum(t.numel() * t.element_size() for t in others if id(t) not in in_stacks)
    layers = tuple(
        MoeLayer(number, f"{group.prefix}.{number}", parent_of(stack.name), stack.name)
        for number, stack in zip(group.layer_ids, chosen, strict=True)
    )
    return ModelLayout(
        model, dtype, layers, group.prefix, counts[0], parameters, expert_bytes, other_bytes
    )


def _takes_routing(module: nn.Module) -> bool:
    """Whether forward takes hidden states, ids and weights, whatever their names."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return len(positional) == 3


def _expert_parameters(
    module: nn.Module, num_experts: int, name: str
) -> dict[str, tuple[int, ...]]:
    found = {}
    for key, parameter in module.named_parameters():
        if "." in key or parameter.shape[0] != num_experts:
            raise PlacerError(f"{name}.{key} {tuple(parameter.shape)} is not split by expert")
        found[key] = tuple(parameter.shape[1:])
    return found


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product

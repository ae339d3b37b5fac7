"""A model's shape from its configuration alone: the model is built without weights.

Experts are found as the tracer finds them (by the shapes of parameters), so every family that it
knows is known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from placer.errors import BadFileError, MissingExtraError, PlacerError
from placer.models.shape import ModelShape
from placer.models.storage import storage_of

_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "expert_top_k",
    "num_selected_experts",
    "experts_per_token",
)
_BLOCKS_WITHOUT_KV = ("mamba", "linear", "conv", "recurrent", "kda")


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of a checkpoint folder; only its config.json is read.

    Raises:
        BadFileError: no configuration that transformers can read.
        MissingExtraError: transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise BadFileError(f"{folder} has no config.json", "name the folder of a checkpoint")
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise BadFileError(
            f"{folder / 'config.json'} cannot be read: {_first_line(error)}",
            "a model with code of its own, or newer than the transformers here?",
        ) from None
    return shape_of_config(config, str(folder), f"{folder / 'config.json'}")


def shape_of_config(config: Any, name: str, source: str) -> ModelShape:
    """The shape of a transformers configuration.

    Raises:
        PlacerError: transformers cannot build the model, or it has no experts.
    """
    import torch

    from placer.tracer.dims import expert_dims
    from placer.tracer.layers import choose_group
    from placer.tracer.structure import find_stacks

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    storage = storage_of(getattr(config, "quantization_config", None))
    counts = {count for count in _expert_counts(text.to_dict()) if count >= 2}
    model = _empty_model(config)
    stacks = find_stacks(model) if counts else []
    # other like modules may look like experts; the configuration knows how many of those there are
    stacks = [stack for stack in stacks if stack.num_experts in counts] or stacks
    stacks = [stack for stack in stacks if "shared" not in stack.name] or stacks
    stacks = [stack for stack in stacks if "expert" in stack.name] or stacks
    if not stacks:
        raise PlacerError(f"{name} has no experts", "is it a Mixture-of-Experts model?")
    group, _ = choose_group([stack.name for stack in stacks], None)
    chosen = [stack for stack in stacks if stack.name in group.names]
    first = [stack for stack in chosen if stack.block == chosen[0].block]
    dims = expert_dims(model, first)
    num_experts = chosen[0].num_experts
    expert_params = (dims.expert_bytes or 0) // 2  # the empty model is in bfloat16
    experts = {id(parameter) for stack in chosen for parameter in stack.module.parameters()}
    others = [
        (module, parameter_name, parameter)
        for module, parameter_name, parameter in _parameters(model)
        if id(parameter) not in experts
    ]
    other_params = sum(parameter.numel() for _, _, parameter in others)
    other_bytes: float | None = None
    if storage is not None:
        other_bytes = sum(
            parameter.numel()
            * (
                storage.linear_bytes
                if isinstance(module, torch.nn.Linear) and storage.converts(parameter_name)
                else storage.plain_bytes
            )
            for module, parameter_name, parameter in others
        )
    return ModelShape(
        name=name,
        num_layers=int(getattr(text, "num_hidden_layers", None) or len(group.names)),
        num_moe_layers=len({stack.block for stack in chosen}),
        num_experts=num_experts,
        top_k=top_k_of(text),
        num_expert_groups=int(getattr(text, "n_group", None) or 1),
        hidden_size=int(dims.hidden_size or 0),
        expert_params=expert_params,
        expert_bytes=None if storage is None else round(expert_params * storage.expert_bytes),
        expert_flops_per_token=dims.expert_flops_per_token,
        other_params=other_params,
        other_bytes=None if other_bytes is None else round(other_bytes),
        kv_bytes_per_token=kv_bytes_of(text),
        source=source,
    )


def top_k_of(text: Any) -> int:
    """The most experts that a token uses in a layer, by the configuration."""
    top_k = next((getattr(text, key) for key in _TOP_K if getattr(text, key, None)), 1)
    return int(max(top_k) if isinstance(top_k, list | tuple) else top_k)


def kv_bytes_of(text: Any, element_bytes: int = 2) -> int | None:
    """Keys and values of one token over all layers that keep them; None where it cannot be told.

    Multi-head latent attention keeps one latent and one rotary key per layer. Layers of another
    kind than attention (state-space, convolution, linear attention) keep none per token; sliding
    windows are counted like the rest, as long as the context is shorter than they are.
    """
    try:
        return _kv_bytes(text, element_bytes)
    except Exception as error:  # transformers refuses what varies by layer, by an error of its own
        if "per-layer" not in str(error):
            raise
        return None


def _kv_bytes(text: Any, element_bytes: int) -> int | None:
    num_layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(num_layers, int) or getattr(text, "is_encoder_decoder", False):
        return None
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds:
        keeps = [kind for kind in kinds if not any(w in str(kind) for w in _BLOCKS_WITHOUT_KV)]
        num_layers = len([kind for kind in keeps if str(kind) not in ("moe", "mlp")])
    latent = getattr(text, "kv_lora_rank", None)
    if latent:
        per_layer = latent + (getattr(text, "qk_rope_head_dim", 0) or 0)
        return int(num_layers * per_layer * element_bytes)
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None)
    hidden = getattr(text, "hidden_size", None)
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int):
        head_dim = hidden // heads
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        return None
    return num_layers * 2 * kv_heads * head_dim * element_bytes


def _expert_counts(values: dict[str, Any]) -> Iterator[int]:
    """Whole numbers under keys that speak of experts, those of nested configurations too."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif "expert" in str(key) and isinstance(value, int) and not isinstance(value, bool):
            yield value


def _empty_model(config: Any) -> Any:
    import torch

    transformers = _transformers()
    kinds = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    )
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise PlacerError(f"transformers has no model for {type(config).__name__}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # shapes as without it; storage accounts for it
    try:
        with torch.device("meta"):
            return kind.from_config(config, dtype=torch.bfloat16)
    except Exception as error:
        raise PlacerError(
            f"transformers cannot build the model: {_first_line(error)}",
            "is its configuration complete?",
        ) from error


def _parameters(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """Module, full name and parameter of every parameter, shared ones once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, f"{module_name}.{own}", parameter


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtraError("transformers", "trace") from None
    return transformers


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

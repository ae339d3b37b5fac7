"""Loading a Hugging Face model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from placer.errors import MissingExtraError, PlacerError, UsageError

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to generate.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        device: where inputs go.
        padding: id of the padding token (that of the end of a sequence where there is none).
    """

    model: Any
    tokenizer: Any
    device: torch.device
    padding: int


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: id on the hub, or a folder.
        device: "auto" (all GPUs if there are any, else the CPU) or a device such as "cuda:0".
        dtype: "auto" (as the weights are stored), float32, bfloat16 or float16.
        trust_remote_code: run code that comes with the model.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtraError("transformers", "trace") from None
    if dtype not in _DTYPES:
        raise UsageError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    target = _device(device)
    if device == "auto" and torch.cuda.device_count() > 1:
        options["device_map"] = "auto"
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        kind = _model_class(config, trust_remote_code)
        model = kind.from_pretrained(
            name, config=config, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise PlacerError(
            f"{name} cannot be loaded: {first}",
            "is it a folder with a model and its tokenizer, or an id on the hub that this "
            "machine reaches? a model with code of its own needs --trust-remote-code",
        ) from error
    if "device_map" not in options:
        model = model.to(target)
    model.eval()
    padding = tokenizer.pad_token_id
    padding = _first(tokenizer.eos_token_id) if padding is None else padding
    padding = _first(model.generation_config.eos_token_id) if padding is None else padding
    return Loaded(model, tokenizer, model.device, 0 if padding is None else int(padding))


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    has_own_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    causal = transformers.AutoModelForCausalLM
    if has_own_code or type(config) in causal._model_mapping:
        return causal
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return causal  # which says what it does not know


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device is {device!r}", "try cpu, cuda, cuda:1 or auto") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", "trace on the CPU: --device cpu")
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value

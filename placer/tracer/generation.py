"""`GenerateCall`: what a running `model.generate(...)` tells about the passes inside it.

generate() goes on feeding padding to rows that are over, until the last row is; which tokens are
prompt and which were generated, only it knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from placer.tracer.sequences import Sequences


@dataclass
class GenerateCall:
    """One call of generate().

    Attributes:
        num_prompt_columns: columns of the prompt, padding included; those after it are decode.
        stop_tokens: tokens after which a row is over; they, too, are fed only because other rows
            go on.
        num_beams: rows of a request in beam search, else 1.
        sequences: the rows, once the first pass has started.
    """

    num_prompt_columns: int
    stop_tokens: frozenset[int]
    num_beams: int
    sequences: Sequences | None = None


def read_call(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GenerateCall:
    """Read the arguments of `model.generate(*args, **kwargs)`."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    defaults = getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        value = getattr(given, name, None)
        return getattr(defaults, name, None) if value is None else value

    stop_tokens = _ids(setting("eos_token_id"))
    num_beams = setting("num_beams") or 1
    if stop_tokens and (kwargs.get("stopping_criteria") or setting("stop_strings")):
        # rows may end without an end token, and are fed padding from then on
        stop_tokens |= _ids(setting("pad_token_id"))
    return GenerateCall(
        num_prompt_columns=_prompt_columns(model, args, kwargs),
        # the beams of a search are not rows that end one by one
        stop_tokens=frozenset(stop_tokens if num_beams == 1 else ()),
        num_beams=num_beams,
    )


def wrap_generate(
    model: nn.Module, enter: Callable[[GenerateCall], None], leave: Callable[[], None]
) -> Callable[[], None]:
    """Have `model.generate` call `enter` and `leave` around itself; returns what undoes that."""
    original = getattr(model, "generate", None)
    if not callable(original):
        return lambda: None

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        enter(read_call(model, args, kwargs))
        try:
            return original(*args, **kwargs)
        finally:
            leave()

    had_own = model.__dict__.get("generate")
    model.__dict__["generate"] = generate

    def undo() -> None:
        if had_own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = had_own

    return undo


def _prompt_columns(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        prompt = kwargs.get("decoder_input_ids")
        return int(prompt.shape[1]) if isinstance(prompt, Tensor) else 1
    names = ("inputs", "input_ids", "inputs_embeds")
    prompts = [args[0] if args else None, *(kwargs.get(name) for name in names)]
    # continuing from a cache, the ids may be the new ones only; the mask covers all
    prompts.append(kwargs.get("attention_mask"))
    return max((int(p.shape[1]) for p in prompts if isinstance(p, Tensor)), default=1)


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    if isinstance(value, Tensor):
        value = value.tolist()
    return {int(v) for v in value} if isinstance(value, Iterable) else {int(value)}

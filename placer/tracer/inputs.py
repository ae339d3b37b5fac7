"""What a model was called with: how many rows and columns, which of them are padding.

Shapes: B rows (sequences), S new columns (positions) of this pass, P columns in the cache already.
Nothing here waits for the device, but for the length of a static cache at a prefill.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from placer.errors import UsageError

_MASK_HINT = "say which tokens are real before the call: tracer.batch(valid=...)"
_PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")


class Inputs(NamedTuple):
    """One call of a model.

    Attributes:
        num_rows, num_columns: B and S, or None where they cannot be told from the arguments.
        tokens: [B, S] token ids, or None.
        mask: the attention mask as it was given.
        cache: the cache as it was given, or None.
        is_packed: whether the rows hold several sequences one after another.
    """

    num_rows: int | None
    num_columns: int | None
    tokens: Tensor | None
    mask: Any
    cache: Any
    is_packed: bool


class InputReader:
    """Reads the arguments of one module's forward by name, wherever they stand."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        places = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        self._places = {name: i for i, name in enumerate(places)}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        get = self._getter(args, kwargs)
        tokens = get("input_ids")
        shaped = tokens if isinstance(tokens, Tensor) else get("inputs_embeds")
        if not isinstance(shaped, Tensor):
            tokens = None
            shape = _plain_shape([*args, *kwargs.values()])
        elif shaped is tokens:
            shape = (1, *tokens.shape) if tokens.dim() == 1 else tuple(tokens.shape)
        else:
            shape = tuple(shaped.shape[:2])
            tokens = None
        cache = get("past_key_values")
        return Inputs(
            num_rows=shape[0] if shape else None,
            num_columns=shape[1] if shape else None,
            tokens=tokens,
            mask=get("attention_mask"),
            cache=get("cache_params") if cache is None else cache,
            is_packed=any(kwargs.get(name) is not None for name in _PACKED),
        )

    def _getter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
        def get(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            place = self._places.get(name, len(args))
            return args[place] if place < len(args) else None

        return get


def cache_in(output: Any) -> Any:
    """The cache in what a model returned, or None."""
    for name in ("past_key_values", "cache_params"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if found is not None:
            return found
    return None


def past_columns(cache: Any, known: int | None, num_columns: int) -> int | None:
    """P, the columns in `cache`; None where it does not say.

    A static cache keeps its length on the device; in decode, `known` (the columns that were
    counted so far) is used rather than waiting for it.
    """
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):  # a layer's keys are [B, heads, P, width]
        return int(cache[0][0].shape[-2]) if cache and cache[0] else 0
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        length = cache.get_seq_length()
    except (ValueError, IndexError, NotImplementedError):
        return None  # no layer of it counts positions
    if isinstance(length, Tensor) and length.device.type != "cpu" and num_columns == 1 and known:
        return known
    return int(length)


def valid_columns(mask: Any, past: int, num_rows: int, num_columns: int) -> Tensor | None:
    """[B, S] which of the new tokens are real, or None when all are.

    Args:
        mask: [B, P + S] or [B, S] with 0 for padding; or [B, 1, S, W] with what each token may
            attend to, where padding does not attend to itself; or a dictionary of those.
        past: P.
    """
    if isinstance(mask, Mapping):
        masks = [mask.get("full_attention"), *mask.values()]
        mask = next((m for m in masks if m is not None), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        raise UsageError(
            f"padding cannot be told from an attention mask of type {type(mask).__name__}",
            _MASK_HINT,
        )
    if mask.dim() == 2:
        if mask.shape[1] >= past + num_columns:
            mask = mask[:, past : past + num_columns]
        if tuple(mask.shape) == (num_rows, num_columns):
            new: Tensor = mask
            return new
    else:
        square = mask[:, 0] if mask.dim() == 4 else mask
        if square.shape[-2] == num_columns and square.shape[-1] >= past + num_columns:
            own = square.diagonal(offset=past, dim1=-2, dim2=-1)
            if own.dtype.is_floating_point:
                own = own > torch.finfo(own.dtype).min / 2
            diagonal: Tensor = own.expand(num_rows, num_columns)
            return diagonal
    raise UsageError(
        f"padding cannot be told from an attention mask of shape {tuple(mask.shape)}; the pass "
        f"has {num_rows} rows of {num_columns} new tokens after {past} in the cache",
        _MASK_HINT,
    )


def _plain_shape(values: list[Any]) -> tuple[int, ...] | None:
    """(B, S) of the first tensor among a plain module's arguments, or None."""
    for value in values:
        if isinstance(value, Tensor):
            is_float = value.dtype.is_floating_point
            if value.dim() == (3 if is_float else 2):
                return tuple(value.shape[:2])
            if value.dim() == (2 if is_float else 1):
                return (1, value.shape[0])
            return None
    return None

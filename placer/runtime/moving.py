"""A decode pass in which tokens move from rank to rank between layers (coherent dispatch).

Every rank calls the stock model with all B rows of the batch, so that embeddings, masks and
positions are the model's own; its decoder layers are run with only those rows whose tokens are
here. Keys and values of earlier tokens are on every rank; those of this pass are collected where
they are made and exchanged once, at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from placer.runtime.context_cache import NewContext, RowView
from placer.runtime.dispatch.coherent import coherent
from placer.runtime.engine import Engine, PassTokens
from placer.runtime.probe import first_tensor
from placer.runtime.rows import Tokens

if TYPE_CHECKING:
    from transformers import Cache


class _Routed(Exception):
    """A layer has come to its experts: it goes on elsewhere."""

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.ids, self.weights = ids, weights


class Mover:
    """Runs an engine's model with tokens that move.

    Args:
        engine: the engine; its decoder layers are wrapped.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._halves = engine.probe.halves()
        self.shapes = engine.probe.cache_shapes()
        self._rows: Tensor | None = None  # [n] of the batch, increasing; None = not moving
        self._residual: Tensor | None = None
        self._given: Tensor | None = None
        numbers = {layer.layer: i for i, layer in enumerate(engine.layout.layers)}
        for name, module in engine.model.get_submodule(engine.layout.all_layers).named_children():
            path = f"{engine.layout.all_layers}.{name}"
            module.forward = self._wrapped(module.forward, numbers.get(path))
        for halves in self._halves:
            halves.norm.register_forward_pre_hook(self._keep_residual)
        engine.model.get_output_embeddings().register_forward_pre_hook(self._only_rows)

    def run(
        self,
        inputs: dict[str, Any],
        cache: Cache,
        rows: Tensor,
        positions: NDArray[np.int64],
        step: int,
        num_active: int,
    ) -> tuple[Tensor, Tensor, NewContext]:
        """One pass.

        Args:
            inputs: arguments of the model, for all B rows of one token each.
            cache: keys and values of all earlier tokens of all rows.
            rows: [n] rows whose tokens enter here, increasing.
            positions: [B] position of every row's token.
            step: number of the pass.
            num_active: tokens of this pass on all ranks together.

        Returns:
            [m] rows whose tokens ended here, their logits [m, V], and the keys and values that
            were made here.
        """
        self._rows = rows
        self._cache, self._positions, self._step = cache, positions, step
        self._new = NewContext()
        engine = self._engine
        engine.group.tokens_of_rank = [num_active] * engine.group.transport.num_ranks
        before = engine.swap_experts(self._experts)
        try:
            output = engine.model(**inputs, past_key_values=cache, use_cache=True)
            return self._rows, output.logits[:, -1], self._new
        finally:
            engine.swap_experts(before)
            self._rows = None

    def _wrapped(self, original: Callable[..., Any], number: int | None) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._rows is None:
                return original(hidden_states, *args, **kwargs)
            return self._layer(original, number, hidden_states, args, kwargs)

        return forward

    def _layer(
        self,
        original: Callable[..., Any],
        number: int | None,
        hidden_states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        assert self._rows is not None
        rows, num_rows = self._rows, len(hidden_states)
        here = _rows_of((hidden_states, args, kwargs), rows, num_rows)
        here[2]["past_key_values"] = RowView(self._cache, rows, self._new)
        out = torch.zeros_like(hidden_states)
        if number is None:
            if len(rows):
                out[rows] = first_tensor(original(here[0], *here[1], **here[2]))
            return out
        tokens = self._route(original, number, here)
        halves = self._halves[number]
        landed = coherent(self._engine.group, number, tokens, halves.norm)
        self._rows = landed.row.long()
        if len(self._rows):
            self._given = landed.total
            made = first_tensor(halves.block(landed.normalised[:, None]))
            out[self._rows] = landed.residual[:, None] + made
        return out

    def _route(self, original: Callable[..., Any], number: int, here: Any) -> Tokens:
        """The layer up to its experts, for the tokens that are here."""
        assert self._rows is not None
        rows = self._rows
        hidden, args, kwargs = here
        if not len(rows):
            top_k = self._engine.probe.top_k
            empty = torch.empty((0, top_k), device=hidden.device)
            return Tokens(hidden.reshape(0, hidden.shape[-1]), empty.int(), empty, rows.int())
        self._given = None
        try:
            original(hidden, *args, **kwargs)
        except _Routed as routed:
            ids, weights = routed.ids, routed.weights
        else:
            raise AssertionError("a MoE layer ran without its experts")
        assert self._residual is not None
        residual = self._residual.reshape(len(rows), -1)
        who = rows.cpu().numpy()
        tokens = PassTokens(rows, who, self._positions[who], self._step)
        chosen = self._engine.routed(
            number, residual, ids.reshape(len(rows), -1), weights.reshape(len(rows), -1), tokens
        )
        return Tokens(chosen.hidden, chosen.slots, chosen.weights, rows.int())

    def _experts(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """On the way to the experts, stop; on the way back, give what they made."""
        if self._given is None:
            raise _Routed(ids, weights)
        given, self._given = self._given, None
        return given.view_as(hidden)

    def _keep_residual(self, module: Any, args: tuple[Any, ...]) -> None:
        self._residual = args[0]

    def _only_rows(self, module: Any, args: tuple[Any, ...]) -> Any:
        """Logits of the tokens that are here, not of all rows."""
        if self._rows is None:
            return None
        return (args[0].index_select(0, self._rows), *args[1:])


def _rows_of(value: Any, rows: Tensor, num_rows: int) -> Any:
    """The same arguments for some rows only; tensors whose first axis is not B stay as they are."""
    if isinstance(value, Tensor):
        is_batched = value.dim() > 1 and value.shape[0] == num_rows
        return value.index_select(0, rows) if is_batched else value
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, num_rows) for part in value)
    if isinstance(value, dict):
        return {key: _rows_of(part, rows, num_rows) for key, part in value.items()}
    return value

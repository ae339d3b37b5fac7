"""`Pass`: one forward pass on its way from the device to rows of a trace.

Shapes: B rows of S new columns, N = B S tokens in row-major order, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from placer.errors import PlacerError, UsageError
from placer.trace import DECODE, PREFILL
from placer.tracer.copies import HostCopy, narrow, own, stack_layers
from placer.tracer.sequences import Sequences
from placer.tracer.sites import Layout


@dataclass(frozen=True)
class Told:
    """What the user said of the next pass; None where nothing was said.

    Attributes:
        requests: [B] or [B, S] request ids.
        positions: [B, S] positions in the requests.
        valid: [B] or [B, S], False for tokens that are not to be counted.
        phase: PREFILL or DECODE.
    """

    requests: NDArray[np.int64] | None = None
    positions: NDArray[np.int64] | None = None
    valid: NDArray[np.bool_] | None = None
    phase: int | None = None


@dataclass
class Pass:
    """One forward pass.

    Attributes:
        step: its number.
        num_rows, num_columns: B and S, None until the routing shows them.
        past: P, columns in the cache before it.
        sequences: the rows; None when the user told requests and positions of each token.
        told: what the user said of it.
        valid: [B, S] which tokens are real, None for all.
        prefix: [B, P] which tokens before it are real, when these were not traced.
        tokens: [B, S] token ids, when rows may end.
        stop_tokens: tokens after which a row is over.
        num_prompt_columns: columns of the prompt inside a generate() call, else None.
        first_new: column before which tokens were counted in an earlier pass.
    """

    step: int
    num_rows: int | None
    num_columns: int | None
    past: int = 0
    sequences: Sequences | None = None
    told: Told = field(default_factory=Told)
    valid: Tensor | None = None
    prefix: Tensor | None = None
    tokens: Tensor | None = None
    stop_tokens: frozenset[int] = frozenset()
    num_prompt_columns: int | None = None
    first_new: int = 0

    def start_copy(
        self, layout: Layout, ids: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> None:
        """Send the routing of the L layers, and what is needed to read it, to the host."""
        stacked = stack_layers(ids)
        self.num_tokens = self._check_num_tokens(layout, stacked)
        gates = stack_layers(weights) if layout.has_weights else []  # type: ignore[arg-type]
        context = [self.valid, self.prefix, self.tokens]
        self.valid = self.prefix = self.tokens = None
        self._ids = [places for places, _ in stacked]
        self._weights = [places for places, _ in gates]
        self._context = [tensor is not None for tensor in context]
        self._copy = HostCopy(
            [narrow(values, layout.num_experts) for _, values in stacked]
            + [values for _, values in gates]
            + [own(tensor) for tensor in context if tensor is not None]
        )

    def _check_num_tokens(self, layout: Layout, stacked: Sequence[tuple[list[int], Tensor]]) -> int:
        """N; refuses a pass whose layers did not all get all tokens."""
        expected = None
        if self.num_rows is not None and self.num_columns is not None:
            expected = self.num_rows * self.num_columns
        for places, values in stacked:
            num_tokens = values.numel() // (values.shape[0] * values.shape[-1])
            expected = num_tokens if expected is None else expected
            if num_tokens != expected:
                raise PlacerError(
                    f"{layout.sites[places[0]].name} got {num_tokens} of the {expected} tokens of "
                    "a forward pass, so which token is which cannot be told",
                    "trace text without images, or choose other layers with routers=",
                )
        assert expected is not None
        return expected

    def is_copied(self) -> bool:
        return self._copy.is_done()

    def rows(self, layout: Layout) -> dict[str, NDArray[Any] | None]:
        """The counted tokens as columns of a trace: experts [t, L, K] and the rest [t]."""
        arrays = self._copy.arrays()
        num_layers, num_ids = len(layout.sites), len(self._ids)
        experts = _place(arrays[:num_ids], self._ids, num_layers, layout.top_k, -1)
        weights = None
        if self._weights:
            taken = arrays[num_ids : num_ids + len(self._weights)]
            weights = _place(taken, self._weights, num_layers, layout.top_k, 0).astype(np.float32)
        context = iter(arrays[num_ids + len(self._weights) :])
        valid, prefix, tokens = (next(context) if has else None for has in self._context)
        shape = self._shape(len(experts))
        valid = np.ones(shape, np.bool_) if valid is None else valid.astype(np.bool_)
        told = self.told
        if told.valid is not None:
            valid = valid & _spread(told.valid, shape, "valid")
        requests, positions = self._identify(valid, prefix, shape)
        counted = valid & self._counted_rows(tokens, shape)
        keep = counted.reshape(-1)
        phase = np.broadcast_to(self._phase(shape[1]), shape)
        return {
            "experts": experts[keep],
            "weights": None if weights is None else weights[keep],
            "request": requests.reshape(-1)[keep],
            "position": positions.reshape(-1)[keep],
            "phase": phase.reshape(-1)[keep],
            "step": np.full(int(keep.sum()), self.step, np.int64),
        }

    def _shape(self, num_tokens: int) -> tuple[int, int]:
        if self.num_rows is None or self.num_columns is None:
            return 1, num_tokens
        return self.num_rows, self.num_columns

    def _identify(
        self, valid: NDArray[np.bool_], prefix: NDArray[Any] | None, shape: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[B, S] requests and positions."""
        told = self.told
        requests = positions = None
        if self.sequences is not None:
            if prefix is not None:
                self.sequences.start_after((prefix != 0).sum(axis=1), self.past)
            positions = self.sequences.advance(self.past, valid)
            requests = _spread(self.sequences.requests, shape, "requests")
        if told.requests is not None:
            requests = _spread(told.requests, shape, "requests")
        if told.positions is not None:
            positions = _spread(told.positions, shape, "positions")
        assert requests is not None
        assert positions is not None
        return requests, positions

    def _counted_rows(
        self, tokens: NDArray[Any] | None, shape: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """[B, S] tokens of rows that are not over, that no earlier pass counted."""
        columns = self.past + np.arange(shape[1])
        is_new = columns >= self.first_new
        counted = np.broadcast_to(is_new, shape)
        if self.sequences is None or self.num_prompt_columns is None:
            return counted
        if is_new.sum() == 1 and columns[-1] >= self.num_prompt_columns:
            last = None if tokens is None else tokens[:, -1]
            ended = self.sequences.mark_ended(last, self.stop_tokens)
            return counted & ~ended[:, None]
        self.sequences.revive()
        return counted

    def _phase(self, num_columns: int) -> NDArray[np.uint8]:
        """[S] phase of each column."""
        columns = self.past + np.arange(num_columns)
        if self.told.phase is not None:
            is_decode = np.full(num_columns, self.told.phase == DECODE)
        elif self.num_prompt_columns is not None:
            is_decode = columns >= self.num_prompt_columns
        else:
            is_decode = np.full(num_columns, self.past > 0 and num_columns == 1)
        return np.where(is_decode, np.uint8(DECODE), np.uint8(PREFILL))


def _place(
    stacked: Sequence[NDArray[Any]],
    places: Sequence[list[int]],
    num_layers: int,
    top_k: int,
    fill: int,
) -> NDArray[Any]:
    """[N, L, K] from stacks of alike layers [l, ..., k]."""
    flat = [values.reshape(values.shape[0], -1, values.shape[-1]) for values in stacked]
    if len(flat) == 1 and flat[0].shape[2] == top_k:
        return flat[0].transpose(1, 0, 2)
    whole = np.full((flat[0].shape[1], num_layers, top_k), fill, flat[0].dtype)
    for values, layers in zip(flat, places, strict=True):
        whole[:, layers, : values.shape[2]] = values.transpose(1, 0, 2)
    return whole


def _spread(values: NDArray[Any], shape: tuple[int, int], name: str) -> NDArray[Any]:
    """`values` [B] or [B, S] as [B, S]."""
    if values.shape == (shape[0],):
        return np.broadcast_to(values[:, None], shape)
    if values.shape == shape:
        return values
    raise UsageError(
        f"{name} has shape {values.shape}, expected ({shape[0]},) or {shape} for a forward pass "
        f"of {shape[0]} rows and {shape[1]} new columns"
    )

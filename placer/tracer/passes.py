"""`Pass`: one forward pass on its way from the device to rows of a trace.

Shapes: B rows of S new columns, N = B S tokens in row-major order, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from placer.errors import PlacerError, UsageError
from placer.trace import DECODE, PREFILL
from placer.tracer.copies import HostCopy, narrow, own, stack_layers
from placer.tracer.sequences import Sequences
from placer.tracer.sites import Layout


class Rows(NamedTuple):
    """Tokens as columns of a trace: experts and weights [t, L, K], the rest [t]."""

    experts: NDArray[Any]
    weights: NDArray[Any] | None
    request: NDArray[np.int64]
    position: NDArray[np.int64]
    phase: NDArray[np.uint8]
    step: NDArray[np.int64]

    def where(self, mask: NDArray[np.bool_]) -> Rows:
        """The tokens where `mask` [t] is true."""
        kept: list[Any] = [None if column is None else column[mask] for column in self]
        return Rows(*kept)


class Told(NamedTuple):
    """What the user said of the next pass; None where nothing was said.

    Attributes:
        requests: [B] or [B, S] request ids.
        positions: [B] or [B, S] positions in the requests.
        valid: [B] or [B, S], False for tokens that are not to be counted.
        phase: PREFILL or DECODE.
    """

    requests: NDArray[np.int64] | None = None
    positions: NDArray[np.int64] | None = None
    valid: NDArray[np.bool_] | None = None
    phase: int | None = None

    def spread(self, num_rows: int, num_columns: int) -> Told:
        """The same with all arrays [B, S]; refuses what does not fit the pass."""
        shape = (num_rows, num_columns)
        return Told(
            _spread("requests", self.requests, shape),
            _spread("positions", self.positions, shape),
            _spread("valid", self.valid, shape),
            self.phase,
        )


def _spread(name: str, values: NDArray[Any] | None, shape: tuple[int, int]) -> Any:
    if values is None or values.shape == shape:
        return values
    if values.shape == (shape[0],):
        return np.broadcast_to(values[:, None], shape)
    raise UsageError(
        f"{name} has shape {values.shape}, expected ({shape[0]},) or {shape} for a forward pass "
        f"of {shape[0]} rows and {shape[1]} new columns"
    )


NOTHING_TOLD = Told()
NOTHING_COPIED = HostCopy(())


@dataclass(slots=True)
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
        num_tokens: N, padding included.
    """

    step: int
    num_rows: int | None
    num_columns: int | None
    past: int = 0
    sequences: Sequences | None = None
    told: Told = NOTHING_TOLD
    valid: Tensor | None = None
    prefix: Tensor | None = None
    tokens: Tensor | None = None
    stop_tokens: frozenset[int] = frozenset()
    num_prompt_columns: int | None = None
    first_new: int = 0
    num_tokens: int = 0
    _ids: Sequence[list[int]] = ()
    _weights: Sequence[list[int]] = ()
    _context: tuple[bool, bool, bool] = (False, False, False)
    _copy: HostCopy = NOTHING_COPIED

    def start_copy(
        self, layout: Layout, ids: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> None:
        """Send the routing of the L layers, and what is needed to read it, to the host."""
        stacked = stack_layers(ids)
        self.num_tokens = self._check_num_tokens(layout, stacked)
        gates = stack_layers(weights) if layout.has_weights else []  # type: ignore[arg-type]
        context = (self.valid, self.prefix, self.tokens)
        self.valid = self.prefix = self.tokens = None
        self._ids = [places for places, _ in stacked]
        self._weights = [places for places, _ in gates]
        self._context = (context[0] is not None, context[1] is not None, context[2] is not None)
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
            if values.shape[-1] > layout.top_k:
                raise PlacerError(
                    f"{layout.sites[places[0]].name} chose {values.shape[-1]} experts for a token, "
                    f"{layout.top_k} in the first forward pass"
                )
        assert expected is not None
        return expected

    def is_copied(self) -> bool:
        return self._copy.is_done()

    def rows(self, layout: Layout) -> Rows:
        """The counted tokens."""
        arrays = self._copy.arrays()
        num_layers, num_ids = len(layout.sites), len(self._ids)
        experts = _place(arrays[:num_ids], self._ids, num_layers, layout.top_k, -1)
        weights = None
        if self._weights:
            taken = arrays[num_ids : num_ids + len(self._weights)]
            weights = _place(taken, self._weights, num_layers, layout.top_k, 0)
        context = iter(arrays[num_ids + len(self._weights) :])
        valid, prefix, tokens = (next(context) if has else None for has in self._context)
        assert self.num_rows is not None
        assert self.num_columns is not None
        if valid is not None:
            valid = valid.astype(np.bool_)
            valid = None if valid.all() else valid
        if self.told.valid is not None:
            valid = self.told.valid if valid is None else valid & self.told.valid
        requests, positions = self._identify(valid, prefix)
        rows = Rows(
            experts,
            weights,
            requests,
            positions,
            self._phases(),
            np.full(len(experts), self.step, np.int64),
        )
        counted = self._counted(tokens)
        keep = valid if counted is None else counted if valid is None else valid & counted
        if keep is None:
            return rows
        flat = np.broadcast_to(keep, (self.num_rows, self.num_columns)).reshape(-1)
        return rows.where(flat)

    def _identify(
        self, valid: NDArray[np.bool_] | None, prefix: NDArray[Any] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[N] requests and positions."""
        told = self.told
        requests, positions = told.requests, told.positions
        if self.sequences is not None:
            assert self.num_columns is not None
            if prefix is not None:
                self.sequences.start_after((prefix != 0).sum(axis=1), self.past)
            advanced = self.sequences.advance(self.past, self.num_columns, valid)
            positions = advanced if positions is None else positions
            if requests is None:
                requests = self.sequences.requests
                requests = (
                    np.repeat(requests, self.num_columns) if self.num_columns > 1 else requests
                )
        assert requests is not None
        assert positions is not None
        return requests.reshape(-1), positions.reshape(-1)

    def _counted(self, tokens: NDArray[Any] | None) -> NDArray[np.bool_] | None:
        """[B, 1], [S] or None for all: not of rows that are over, nor counted by earlier passes."""
        assert self.num_columns is not None
        first_new = max(0, self.first_new - self.past)
        is_new = np.arange(self.num_columns) >= first_new if first_new else None
        if self.sequences is None or self.num_prompt_columns is None:
            return is_new
        is_step = self.num_columns - first_new == 1
        if is_step and self.past + self.num_columns > self.num_prompt_columns:
            last = None if tokens is None else tokens[:, -1]
            ended = self.sequences.mark_ended(last, self.stop_tokens)
            if ended is not None:
                return ~ended[:, None] if is_new is None else ~ended[:, None] & is_new
            return is_new
        self.sequences.revive()
        return is_new

    def _phases(self) -> NDArray[np.uint8]:
        """[N] phases."""
        assert self.num_rows is not None
        assert self.num_columns is not None
        num_tokens = self.num_rows * self.num_columns
        if self.told.phase is not None:
            return np.full(num_tokens, self.told.phase, np.uint8)
        if self.num_prompt_columns is None:
            is_decode = self.past > 0 and self.num_columns == 1
            return np.full(num_tokens, DECODE if is_decode else PREFILL, np.uint8)
        num_prefill = min(max(0, self.num_prompt_columns - self.past), self.num_columns)
        phases = np.full((self.num_rows, self.num_columns), DECODE, np.uint8)
        phases[:, :num_prefill] = PREFILL
        return phases.reshape(-1)


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

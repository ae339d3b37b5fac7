"""`Bookkeeper`: which request, position and phase the tokens of each forward pass have."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from placer.errors import UsageError
from placer.trace import PHASE_NAMES
from placer.tracer.generation import GenerateCall
from placer.tracer.inputs import Inputs, cache_in, past_columns, valid_columns
from placer.tracer.passes import NOTHING_TOLD, Pass, Told
from placer.tracer.sequences import Sequences


class Bookkeeper:
    """Follows the rows of a user's batches from pass to pass.

    A pass on an empty cache starts new requests, a pass on a cache that was seen before goes on
    with them.

    Attributes:
        labels: request id -> label.
        generate: the generate() call that is running, or None.
    """

    def __init__(self, *, is_encoder: bool = False) -> None:
        self.labels: dict[int, str] = {}
        self._is_encoder = is_encoder  # it sees whole prompts, whatever generate() does
        self.generate: GenerateCall | None = None
        self._by_cache: weakref.WeakKeyDictionary[Any, Sequences] = weakref.WeakKeyDictionary()
        self._last: Sequences | None = None
        self._next_requests: NDArray[np.int64] | None = None
        self._first_free = 0
        self._num_steps = 0
        self._told = NOTHING_TOLD

    def tell_requests(
        self, requests: ArrayLike, labels: Sequence[str | None] | None = None
    ) -> None:
        """See `Tracer.requests`."""
        ids = _integers("requests", requests)
        if ids.ndim != 1 or not len(ids):
            raise UsageError(f"requests has shape {ids.shape}, expected one id for each row")
        if labels is not None and len(labels) != len(ids):
            raise UsageError(f"{len(labels)} labels for {len(ids)} requests, expected one each")
        for request, label in zip(ids.tolist(), labels or (), strict=False):
            if label and self.labels.setdefault(request, label) != label:
                raise UsageError(
                    f"request {request} is labelled both {self.labels[request]!r} and {label!r}",
                    "give each request its own id",
                )
        self._next_requests = ids

    def tell_pass(
        self,
        requests: ArrayLike | None,
        positions: ArrayLike | None,
        valid: ArrayLike | None,
        phase: str | None,
    ) -> None:
        """See `Tracer.batch`."""
        if phase is not None and phase not in PHASE_NAMES:
            raise UsageError(f"phase is {phase!r}, expected one of {', '.join(PHASE_NAMES)}")
        self._told = Told(
            requests=None if requests is None else _integers("requests", requests),
            positions=None if positions is None else _integers("positions", positions),
            valid=None if valid is None else np.array(_host(valid), np.bool_),
            phase=None if phase is None else PHASE_NAMES.index(phase),
        )

    def start(self, inputs: Inputs) -> Pass:
        """The pass that is about to run; its number of rows may still be unknown."""
        told, self._told = self._told, NOTHING_TOLD
        num_columns = inputs.num_columns
        found = Pass(self._num_steps, inputs.num_rows, num_columns, told=told)
        if inputs.num_rows is None or num_columns is None:
            if told.requests is not None and told.requests.ndim == 1:
                found.num_rows = len(told.requests)
            return found
        if told is not NOTHING_TOLD:
            told = found.told = told.spread(inputs.num_rows, num_columns)
        if inputs.is_packed and (told.requests is None or told.positions is None):
            raise UsageError(
                "several sequences are packed into one row, so requests cannot be told apart",
                "say what the tokens are before the call: "
                "tracer.batch(requests=..., positions=...), both [rows, columns]",
            )
        known = self._known(inputs.cache)
        past = past_columns(inputs.cache, known.num_columns if known else None, num_columns)
        if past is None:  # a cache that does not say how long it is
            past = known.num_columns if known and num_columns == 1 else 0
        found.past = past
        if told.valid is None:
            found.valid = valid_columns(inputs.mask, past, inputs.num_rows, num_columns)
        if told.requests is None or told.positions is None:
            self._follow(found, known, inputs)
        if self.generate is not None and not self._is_encoder:
            found.num_prompt_columns = self.generate.num_prompt_columns
            found.stop_tokens = self.generate.stop_tokens
            if found.stop_tokens and past + num_columns > self.generate.num_prompt_columns:
                found.tokens = inputs.tokens
        return found

    def finish(self, done: Pass, inputs: Inputs, output: Any) -> None:
        """The pass has run: its number counts, and its cache belongs to its rows."""
        self._num_steps += 1
        if done.num_columns is None:  # only the routing told how many tokens there are
            done.num_rows = done.num_rows or 1
            done.num_columns = done.num_tokens // done.num_rows
            done.told = done.told.spread(done.num_rows, done.num_columns)
            if done.told.requests is None or done.told.positions is None:
                self._follow(done, None, inputs)
        sequences = done.sequences
        if sequences is None or done.num_columns is None:
            return
        sequences.num_columns = done.past + done.num_columns
        self._last = sequences
        cache = cache_in(output)
        cache = inputs.cache if cache is None else cache
        if cache is not None and not isinstance(cache, tuple | list):
            self._by_cache[cache] = sequences

    def _known(self, cache: Any) -> Sequences | None:
        if cache is None:
            return None
        return self._last if isinstance(cache, tuple | list) else self._by_cache.get(cache)

    def _follow(self, found: Pass, known: Sequences | None, inputs: Inputs) -> None:
        """Find the rows that go on, or start new ones."""
        assert found.num_rows is not None
        call = None if self._is_encoder else self.generate
        is_recomputed = call is not None and call.sequences is not None and found.past == 0
        if is_recomputed and call is not None:  # generate(use_cache=False) runs all of it again
            known = call.sequences
        if known is not None and (found.past > 0 or is_recomputed):
            if len(known.requests) != found.num_rows:
                raise UsageError(
                    f"a forward pass goes on with {found.num_rows} rows of the "
                    f"{len(known.requests)} that its cache began with; which these are cannot be "
                    "told",
                    "say so before the call: tracer.batch(requests=..., positions=...)",
                )
            found.sequences = known
            found.first_new = known.num_columns if is_recomputed else 0
        else:
            found.sequences = Sequences(self._new_requests(found.num_rows))
            if found.past > 0:
                found.prefix = _whole_prefix(inputs.mask, found)
        if call is not None:
            call.sequences = found.sequences

    def _new_requests(self, num_rows: int) -> NDArray[np.int64]:
        told, self._next_requests = self._next_requests, None
        if told is not None:
            if num_rows % len(told):
                raise UsageError(
                    f"tracer.requests() was given {len(told)} ids, the model {num_rows} rows"
                )
            ids = np.repeat(told, num_rows // len(told))  # beams and samples of a prompt
        else:
            beams = self.generate.num_beams if self.generate is not None else 1
            beams = beams if num_rows % beams == 0 else 1
            ids = np.repeat(self._first_free + np.arange(num_rows // beams), beams)
        self._first_free = max(self._first_free, int(ids.max()) + 1)
        return ids


def _whole_prefix(mask: Any, found: Pass) -> Tensor | None:
    """[B, P] validity of a prefix that was not traced, where the mask tells."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or found.num_columns is None:
        return None
    return mask[:, : found.past] if mask.shape[1] >= found.past + found.num_columns else None


def _host(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.array(_host(values))
    if array.dtype.kind not in "iu":
        raise UsageError(f"{name} holds {array.dtype}, expected integers")
    if array.size and array.min() < 0:
        raise UsageError(f"{name} holds {array.min()}, expected 0 or more")
    return array.astype(np.int64)

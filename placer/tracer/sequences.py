"""`Sequences`: the rows of a batch from their prefill to their last token, on the host.

Columns are the positions of the key-value cache, padding included. A token's position in its
request is the number of real tokens before it in its row, so left padding does not shift it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Sequences:
    """B rows that share a cache.

    Attributes:
        requests: [B] request id of each row.
        num_columns: columns that were passed to the model so far, counted when a pass starts.
    """

    def __init__(self, requests: NDArray[np.int64]) -> None:
        self.requests = requests
        self.num_columns = 0
        self._counted = np.zeros(len(requests), np.int64)  # real tokens in the columns so far
        # width s of each pass and validity [B, s] of its columns (None: all), in order
        self._chunks: list[tuple[int, NDArray[np.bool_] | None]] = []
        self._width = 0
        self._has_ended = np.zeros(len(requests), np.bool_)

    def start_after(self, counts: NDArray[np.int64], num_columns: int) -> None:
        """Take a prefix that was not traced: `counts` [B] real tokens in `num_columns` columns."""
        self._counted = counts.astype(np.int64)
        self._width = num_columns

    def advance(
        self, past: int, num_columns: int, valid: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """[B, S] positions of new tokens that follow `past` columns.

        Columns beyond `past` are forgotten, as when drafted tokens were rejected.

        Args:
            past: P.
            num_columns: S.
            valid: [B, S] which tokens are real, None for all.
        """
        if past != self._width:
            self._crop(past)
        before = self._counted[:, None]
        if valid is None:
            positions = before + np.arange(num_columns)
            self._counted = self._counted + num_columns
        else:
            positions = before + np.cumsum(valid, axis=1) - valid
            self._counted = self._counted + valid.sum(axis=1)
        self._chunks.append((num_columns, valid))
        self._width += num_columns
        return positions

    def mark_ended(
        self, tokens: NDArray[np.int64] | None, stop_tokens: frozenset[int]
    ) -> NDArray[np.bool_] | None:
        """[B] rows that are over: this token [B], or an earlier one, was a stop token.

        None when no row is.
        """
        if tokens is not None and stop_tokens:
            self._has_ended |= np.isin(tokens, list(stop_tokens))
        return self._has_ended if self._has_ended.any() else None

    def revive(self) -> None:
        """The rows go on, as when the next turn of a chat follows."""
        self._has_ended[:] = False

    def _crop(self, past: int) -> None:
        if past > self._width:  # columns that were not traced
            missing = past - self._width
            self._counted = self._counted + missing
            self._chunks.append((missing, None))
            self._width = past
        while self._width > past and self._chunks:
            width, valid = self._chunks.pop()
            keep = max(0, width - (self._width - past))
            gone = width - keep if valid is None else valid[:, keep:].sum(axis=1)
            self._counted = self._counted - gone
            self._width -= width - keep
            if keep:
                self._chunks.append((keep, None if valid is None else valid[:, :keep]))

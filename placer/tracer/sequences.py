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
        self._chunks: list[NDArray[np.bool_]] = []  # [B, s] validity of the columns, in order
        self._width = 0
        self._has_ended = np.zeros(len(requests), np.bool_)

    def start_after(self, counts: NDArray[np.int64], num_columns: int) -> None:
        """Take a prefix that was not traced: `counts` [B] real tokens in `num_columns` columns."""
        self._counted = counts.astype(np.int64)
        self._width = num_columns

    def advance(self, past: int, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
        """[B, S] positions of new tokens that follow `past` columns.

        Columns beyond `past` are forgotten, as when drafted tokens were rejected.
        """
        self._crop(past)
        positions = self._counted[:, None] + np.cumsum(valid, axis=1) - valid
        self._chunks.append(valid)
        self._width += valid.shape[1]
        self._counted = self._counted + valid.sum(axis=1)
        return positions

    def mark_ended(
        self, tokens: NDArray[np.int64] | None, stop_tokens: frozenset[int]
    ) -> NDArray[np.bool_]:
        """[B] rows that are over: this token [B], or an earlier one, was a stop token."""
        if tokens is not None and stop_tokens:
            self._has_ended |= np.isin(tokens, list(stop_tokens))
        return self._has_ended

    def revive(self) -> None:
        """The rows go on, as when the next turn of a chat follows."""
        self._has_ended[:] = False

    def _crop(self, past: int) -> None:
        if past > self._width:  # columns that were not traced
            missing = past - self._width
            self._counted = self._counted + missing
            self._chunks.append(np.ones((len(self.requests), missing), np.bool_))
            self._width = past
        while self._width > past and self._chunks:
            last = self._chunks.pop()
            keep = max(0, last.shape[1] - (self._width - past))
            self._counted = self._counted - last[:, keep:].sum(axis=1)
            self._width -= last.shape[1] - keep
            if keep:
                self._chunks.append(last[:, :keep])

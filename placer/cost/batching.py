"""How a trace's tokens are cut into batches that are priced, and batches into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.trace.model import Trace


@dataclass(frozen=True, eq=False)
class Batching:
    """Batches of a trace's tokens.

    Attributes:
        order: [T'] the tokens that are in a batch, batch by batch.
        starts: [N + 1] where each batch begins in `order`.
        how: in words.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    how: str

    @property
    def num_batches(self) -> int:
        return self.starts.size - 1


def recorded_passes(trace: Trace) -> Batching:
    """All tokens with the same forward-pass number are a batch."""
    assert trace.step is not None
    order = np.argsort(trace.step, kind="stable")
    sizes = np.unique(trace.step, return_counts=True)[1]
    return Batching(order, np.concatenate(([0], np.cumsum(sizes))), "recorded forward passes")


def equal_runs(trace: Trace, batch_tokens: int, how: str) -> Batching:
    """So many consecutive tokens; an incomplete last batch is left out when there is another."""
    num_tokens = trace.num_tokens
    num_batches = max(num_tokens // batch_tokens, min(1, num_tokens))
    starts = np.minimum(np.arange(num_batches + 1) * batch_tokens, num_tokens)
    return Batching(np.arange(num_tokens), starts, f"{batch_tokens} {how}")


def equal_ranks(home: NDArray[np.int32], num_ranks: int, tokens_per_rank: int) -> Batching:
    """The next so many tokens of every home rank, as long as every rank has that many.

    Args:
        home: [T] home rank of each token, tokens in the order in which each rank serves them.
        num_ranks: G.
        tokens_per_rank: t; a batch has G x t tokens, rank by rank.

    Raises:
        UsageError: some rank is home of fewer tokens.
    """
    per_rank = np.bincount(home, minlength=num_ranks)
    num_batches = int(per_rank.min()) // tokens_per_rank
    if num_batches == 0:
        raise UsageError(
            f"rank {int(per_rank.argmin())} is home of {int(per_rank.min())} tokens of this trace, "
            f"fewer than the {tokens_per_rank} of one batch",
            "ask for fewer tokens per rank, or give a trace of more requests",
        )
    by_home = np.argsort(home, kind="stable")
    first = np.concatenate(([0], np.cumsum(per_rank)[:-1]))
    turn = np.arange(num_batches * tokens_per_rank).reshape(num_batches, 1, tokens_per_rank)
    order: NDArray[np.int64] = by_home[(first[None, :, None] + turn).reshape(-1)]
    size = num_ranks * tokens_per_rank
    how = f"{tokens_per_rank} tokens per rank, taken round-robin over requests"
    return Batching(order, np.arange(num_batches + 1) * size, how)


def micro_batches(batching: Batching, home: NDArray[np.int32], num_parts: int) -> Batching:
    """Every batch cut in so many parts; each part has an equal share of every home's tokens.

    Row b x num_parts + i of the result is part i of batch b; parts of small batches may be empty.

    Args:
        batching: N batches.
        home: [T] home rank of each token of the trace.
        num_parts: at least 1.
    """
    if num_parts == 1:
        return batching
    sizes = np.diff(batching.starts)
    tokens = batching.order[: batching.starts[-1]]
    batch = np.repeat(np.arange(sizes.size), sizes)
    key = batch * (int(home.max(initial=0)) + 1) + home[tokens]
    grouped = np.argsort(key, kind="stable")
    _, first, count = np.unique(key[grouped], return_index=True, return_counts=True)
    place = np.empty(tokens.size, np.int64)
    place[grouped] = np.arange(tokens.size) - np.repeat(first, count)
    share = np.empty(tokens.size, np.int64)
    share[grouped] = np.repeat(count, count)
    part = batch * num_parts + place * num_parts // share
    order = np.argsort(part, kind="stable")
    ends = np.cumsum(np.bincount(part, minlength=sizes.size * num_parts))
    return Batching(tokens[order], np.concatenate(([0], ends)), batching.how)

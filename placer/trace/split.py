"""Which requests a plan is fitted to, and which ones judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from placer.errors import UsageError
from placer.wording import counted


@dataclass(frozen=True, eq=False)
class Split:
    """Two disjoint sets of requests.

    Attributes:
        fit: request ids to fit to, increasing.
        held_out: request ids to judge by, increasing.
    """

    fit: NDArray[np.int64]
    held_out: NDArray[np.int64]


def check_holdout(holdout: float) -> None:
    """Raise UsageError where `holdout` is no share that leaves something on both sides."""
    if not 0 < holdout < 1:
        raise UsageError(
            f"holdout is {holdout}, expected a share above 0 and below 1",
            "for example --holdout 0.5: half of the requests judge the plan",
        )


def split_requests(
    request_ids: ArrayLike,
    *,
    seed: int,
    holdout: float = 0.5,
    labels: Mapping[int, str] | None = None,
) -> Split:
    """Split by request, never by token: tokens of one request resemble each other.

    Each label sends the share `holdout` of its requests to the held-out side, as nearly as whole
    requests allow; all sides together hold `round(R * holdout)`, and at least one on each side.
    The outcome depends on the set of ids, their labels and the seed alone, not on their order,
    and not on any library's random generator.

    Args:
        request_ids: ids, in any order, repeated or not.
        seed: picks one of the possible splits.
        holdout: share of the requests that is held out, above 0 and below 1.
        labels: request id -> label; requests without one form a group of their own.
    """
    check_holdout(holdout)
    ids = np.unique(np.asarray(request_ids, np.int64))
    if ids.size < 2:
        raise UsageError(
            f"the trace holds {counted(ids.size, 'request')}; to judge a plan on tokens that it "
            "was not fitted to takes two or more",
            "trace more requests, or --in-sample to judge it on the tokens that it was fitted to",
        )
    shuffled = ids[np.argsort(scramble(ids, seed))]
    groups: dict[str, list[int]] = {}
    for request in shuffled.tolist():
        groups.setdefault((labels or {}).get(request, ""), []).append(request)
    members = [groups[label] for label in sorted(groups)]
    total = min(max(round(ids.size * holdout), 1), ids.size - 1)
    quotas = _quotas([len(group) for group in members], total, _scramble_one(seed))
    chosen = [request for group, n in zip(members, quotas, strict=True) for request in group[:n]]
    held_out = np.sort(np.array(chosen, np.int64))
    return Split(fit=np.setdiff1d(ids, held_out, assume_unique=True), held_out=held_out)


def _quotas(sizes: list[int], total: int, tie_break: int) -> list[int]:
    """How many of each group are held out: proportional, largest remainders first.

    Whole requests rarely divide evenly; equal remainders are served in an order that the seed
    picks, so that no label is always favoured.
    """
    shares = np.array(sizes, np.float64) * total / sum(sizes)
    quotas = np.floor(shares + 1e-9).astype(np.int64)
    remainders = np.round(shares - quotas, 9)
    order = np.lexsort((scramble(np.arange(len(sizes)), tie_break), -remainders))
    quotas[order[: total - int(quotas.sum())]] += 1
    return [int(quota) for quota in quotas]


def scramble(values: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A pseudo-random 64-bit number for each value, distinct for distinct values.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), a bijection.
    """
    key = values.astype(np.uint64) + np.uint64(_scramble_one(seed))
    with np.errstate(over="ignore"):
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _scramble_one(seed: int) -> int:
    """One step of SplitMix64 from `seed`."""
    mask = (1 << 64) - 1
    key = (seed + 0x9E3779B97F4A7C15) & mask
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
    return key ^ (key >> 31)

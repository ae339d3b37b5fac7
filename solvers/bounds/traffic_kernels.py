"""Kernels of `solvers.bounds.traffic`: what tokens choose, counted in one pass."""

from __future__ import annotations

from typing import Any

from solvers.compiling import compiled


def _count_pairs(experts: Any, using: Any, wanted: Any, pairs: Any) -> Any:
    """Count tokens using [K+1] so many experts [T, K], who they want [K+1, E], and their pairs.

    Pairs [E, E] are counted once, in the order of the token's list; -1 = unused.
    """
    width = experts.shape[1]
    for token in range(experts.shape[0]):
        used = 0
        for k in range(width):
            used += experts[token, k] >= 0
        using[used] += 1
        for k in range(width):
            one = experts[token, k]
            if one < 0:
                continue
            wanted[used, one] += 1
            for other_k in range(k + 1, width):
                other = experts[token, other_k]
                if other >= 0:
                    pairs[one, other] += 1.0


def _count_choices(row: Any, experts: Any, counts: Any) -> Any:
    """Experts [T, K] of tokens that each add to a row of counts [R, E], or to none (-1)."""
    for token in range(experts.shape[0]):
        if row[token] < 0:
            continue
        for k in range(experts.shape[1]):
            if experts[token, k] >= 0:
                counts[row[token], experts[token, k]] += 1.0


count_pairs = compiled(_count_pairs)
count_choices = compiled(_count_choices)

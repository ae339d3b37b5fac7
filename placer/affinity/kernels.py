"""Compiled counting of one layer. Imported only when something is counted: numba takes a while.

Shape letters: L layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

_IDS = types.Array(types.uint16, 3, "C", readonly=True)
_WEIGHTS = types.Array(types.float32, 3, "C", readonly=True)
_COUNTS = types.Array(types.uint32, 1, "C")
_SHARES = types.Array(types.float64, 1, "C")
_HISTOGRAM = types.Array(types.int64, 1, "C")


def _compile(signature: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for one signature; keep the machine code on disk where a folder can be written."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # no writable folder for the cache
            return numba.njit(signature, nogil=True)(function)  # type: ignore[no-any-return]

    return decorate


@_compile(
    types.void(
        _IDS, _WEIGHTS, types.int64, types.int64,
        _COUNTS, _COUNTS, _SHARES, _COUNTS, _COUNTS, _HISTOGRAM,
    )
)  # fmt: skip
def count_layer(
    experts: NDArray[np.uint16],
    weights: NDArray[np.float32],
    layer: int,
    num_experts: int,
    coactivation: NDArray[np.uint32],
    full: NDArray[np.uint32],
    rest: NDArray[np.float64],
    primary: NDArray[np.uint32],
    primary_pairs: NDArray[np.uint32],
    histogram: NDArray[np.int64],
) -> None:
    """Add the tokens of a chunk to the tables of one layer, in token order. O(T K^2).

    Args:
        experts: [T, L, K] expert ids as uint16, used ones first; an id >= num_experts = unused.
        weights: [T, L, K] gate weights, or an array without tokens: column 0 is the primary.
        layer: which layer; the last one has no next layer.
        num_experts: E.
        coactivation: [E*E] tokens that chose row and column, counted once: row in the earlier
            column of `experts`; the diagonal is the load.
        full: [E*E] pairs with the next layer, of tokens that use K experts in both layers.
        rest: [E*E] the pairs of all other tokens, SCALE / (k_l * k_{l+1}) each.
        primary: [E*E] primary expert (row) to each expert of the next layer (column).
        primary_pairs: [E*E] primary expert to primary expert of the next layer.
        histogram: [K+1] tokens by how many experts they use in this layer.
    """
    num_tokens, num_layers, top_k = experts.shape
    size = np.uint64(num_experts)
    has_next = layer + 1 < num_layers
    weighted = weights.shape[0] > 0
    for t in range(num_tokens):
        used = 0
        best = 0
        while used < top_k and experts[t, layer, used] < num_experts:
            if weighted and weights[t, layer, used] > weights[t, layer, best]:
                best = used
            used += 1
        histogram[used] += 1
        for i in range(used):
            row = np.uint64(experts[t, layer, i]) * size
            for j in range(i, used):
                coactivation[row + np.uint64(experts[t, layer, j])] += np.uint32(1)
        if used == 0 or not has_next:
            continue

        following = 0
        best_next = 0
        while following < top_k and experts[t, layer + 1, following] < num_experts:
            if weighted and weights[t, layer + 1, following] > weights[t, layer + 1, best_next]:
                best_next = following
            following += 1
        if following == 0:
            continue
        if used == top_k and following == top_k:
            for i in range(top_k):
                row = np.uint64(experts[t, layer, i]) * size
                for j in range(top_k):
                    full[row + np.uint64(experts[t, layer + 1, j])] += np.uint32(1)
        else:
            share = 12006225.0 / (used * following)
            for i in range(used):
                row = np.uint64(experts[t, layer, i]) * size
                for j in range(following):
                    rest[row + np.uint64(experts[t, layer + 1, j])] += share
        row = np.uint64(experts[t, layer, best]) * size
        for j in range(following):
            primary[row + np.uint64(experts[t, layer + 1, j])] += np.uint32(1)
        primary_pairs[row + np.uint64(experts[t, layer + 1, best_next])] += np.uint32(1)

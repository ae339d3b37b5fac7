"""Compiled counting of one layer. Imported only when something is counted: numba takes a while.

What a layer adds inside itself and what it adds together with the next one are counted apart,
because the tables of one of them stay in a core's L2 cache up to 512 experts.

Shape letters: L layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from solvers.compiling import compiled_for

SCALE = 12006225.0
"""Unit of the shares of tokens that use fewer than K experts: (3^2 * 5 * 7 * 11)^2.

SCALE / (k * k') is a binary fraction for every k, k' <= 12 (and most above), so that float64 sums
of it are exact and do not depend on the order of tokens or on how a trace is cut into chunks.
"""

_IDS = types.Array(types.uint16, 3, "C", readonly=True)
_WEIGHTS = types.Array(types.float32, 3, "C", readonly=True)
_COUNTS = types.Array(types.uint32, 1, "C")
_SHARES = types.Array(types.float64, 1, "C")
_HISTOGRAM = types.Array(types.int64, 1, "C")
_PART = types.Array(types.int64, 1, "C", readonly=True)


@compiled_for(types.void(_IDS, types.int64, types.int64, _COUNTS, _HISTOGRAM))
def count_within(
    experts: NDArray[np.uint16],
    layer: int,
    num_experts: int,
    coactivation: NDArray[np.uint32],
    histogram: NDArray[np.int64],
) -> None:
    """Add the co-activations of a chunk of tokens in one layer, in token order. O(T K^2).

    Args:
        experts: [T, L, K] expert ids, used ones first; an id >= num_experts = unused.
        layer: which layer.
        num_experts: E.
        coactivation: [E*E] tokens that chose row and column, each pair once: the row is the expert
            in the earlier column of `experts`; the diagonal is the load.
        histogram: [K+1] tokens by how many experts they use.
    """
    num_tokens, _, top_k = experts.shape
    size = np.uint64(num_experts)
    for t in range(num_tokens):
        used = 0
        while used < top_k and experts[t, layer, used] < num_experts:
            used += 1
        histogram[used] += 1
        for i in range(used):
            row = np.uint64(experts[t, layer, i]) * size
            for j in range(i, used):
                coactivation[row + np.uint64(experts[t, layer, j])] += np.uint32(1)


@compiled_for(
    types.void(_IDS, _WEIGHTS, types.int64, types.int64, _COUNTS, _SHARES, _COUNTS, _COUNTS)
)
def count_between(
    experts: NDArray[np.uint16],
    weights: NDArray[np.float32],
    layer: int,
    num_experts: int,
    full: NDArray[np.uint32],
    rest: NDArray[np.float64],
    primary_affinity: NDArray[np.uint32],
    primary_pairs: NDArray[np.uint32],
) -> None:
    """Add the flow of a chunk of tokens from one layer to the next, in token order. O(T K^2).

    Args:
        experts: [T, L, K] expert ids, used ones first; an id >= num_experts = unused.
        weights: [T, L, K] gate weights, or an array without tokens: column 0 is the primary.
        layer: which layer, not the last.
        num_experts: E.
        full: [E*E] pairs of the tokens that use K experts in both layers.
        rest: [E*E] pairs of all other tokens, SCALE / (k_l * k_{l+1}) each.
        primary_affinity: [E*E] primary expert to each expert of the next layer.
        primary_pairs: [E*E] primary expert to primary expert of the next layer.
    """
    num_tokens, _, top_k = experts.shape
    size = np.uint64(num_experts)
    following = layer + 1
    weighted = weights.shape[0] > 0
    for t in range(num_tokens):
        used = 0
        primary = 0
        while used < top_k and experts[t, layer, used] < num_experts:
            if weighted and weights[t, layer, used] > weights[t, layer, primary]:
                primary = used
            used += 1
        used_next = 0
        primary_next = 0
        while used_next < top_k and experts[t, following, used_next] < num_experts:
            if weighted and weights[t, following, used_next] > weights[t, following, primary_next]:
                primary_next = used_next
            used_next += 1
        if used == 0 or used_next == 0:
            continue
        if used == top_k and used_next == top_k:
            for i in range(top_k):
                row = np.uint64(experts[t, layer, i]) * size
                for j in range(top_k):
                    full[row + np.uint64(experts[t, following, j])] += np.uint32(1)
        else:
            share = SCALE / (used * used_next)
            for i in range(used):
                row = np.uint64(experts[t, layer, i]) * size
                for j in range(used_next):
                    rest[row + np.uint64(experts[t, following, j])] += share
        row = np.uint64(experts[t, layer, primary]) * size
        for j in range(used_next):
            primary_affinity[row + np.uint64(experts[t, following, j])] += np.uint32(1)
        primary_pairs[row + np.uint64(experts[t, following, primary_next])] += np.uint32(1)


@compiled_for(
    types.void(_IDS, _PART, types.Array(types.int64, 3, "C"), types.Array(types.int64, 2, "C"))
)
def count_parts(
    experts: NDArray[np.uint16],
    part: NDArray[np.int64],
    load: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> None:
    """Add the load of a chunk of tokens to the part that each belongs to. O(T L K).

    Args:
        experts: [T, L, K] expert ids, used ones first; an id >= num_experts = unused.
        part: [T] index of the part.
        load: [parts, L, E] token-expert pairs.
        tokens: [parts, L] tokens that use experts of the layer.
    """
    num_tokens, num_layers, top_k = experts.shape
    num_experts = load.shape[2]
    for t in range(num_tokens):
        for layer in range(num_layers):
            used = 0
            while used < top_k and experts[t, layer, used] < num_experts:
                load[part[t], layer, experts[t, layer, used]] += 1
                used += 1
            if used > 0:
                tokens[part[t], layer] += 1

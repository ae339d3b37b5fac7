"""How many experts of a layer a batch activates: what decode reads from memory.

A decode step is bound by reading the weights of every expert that any token of the batch uses, so
tokens per activated expert is its arithmetic intensity (in units of one token's FLOPs per expert).

Shape letters: L layers, E experts, B tokens of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.jackknife import estimate
from placer.affinity.sample import NUM_GROUPS, Sample
from placer.trace.model import DECODE

LARGEST_BATCH = 1024
_LEAST_BATCHES = 4


def activated_experts(sample: Sample) -> list[dict[str, Any]]:
    """Distinct experts per layer of batches of 1, 2, 4, ... tokens of many requests.

    Batches are filled round-robin: one token of every request in turn, as a server that decodes
    many requests at once does. Decode tokens only, where the trace has any.

    Returns:
        of each size with at least 4 batches: `batch_tokens` B, `activated` with interval (mean over
        layers and batches), `share` of E, `independent`: sum over e of 1 - (1 - p_e)^B, what
        tokens that choose independently by load would activate, `tokens_per_expert`: token-expert
        pairs / activated, and, where the model's size is known, `bytes_per_token` read and
        `flops_per_byte`.
    """
    trace = sample.trace
    token = np.flatnonzero(trace.phase == DECODE)
    if token.size == 0:
        token = np.arange(trace.num_tokens)
    order = token[_round_robin(trace.request[token])]
    groups = sample.group_of_token[order]
    used = sample.experts[order] >= 0
    per_token_layer = float(used.sum() / max(1, order.size * trace.num_layers))
    chosen = _choice(sample.experts[order], trace.num_experts)
    dims = trace.model
    found = []
    size = 1
    while size <= LARGEST_BATCH and order.size // size >= _LEAST_BATCHES:
        mean = _mean_distinct(sample, order, size)
        without = [
            _mean_distinct(sample, kept, size)
            for g in range(NUM_GROUPS)
            if (kept := order[groups != g]).size >= size and kept.size < order.size
        ]
        independent = (1 - (1 - chosen) ** size).sum(axis=1).mean()
        pairs = size * per_token_layer
        found.append(
            {
                "batch_tokens": size,
                "activated": estimate(mean, without),
                "share": mean / trace.num_experts,
                "independent": float(independent),
                "tokens_per_expert": pairs / mean if mean else None,
                "bytes_per_token": _times(mean / size * trace.num_layers, dims.expert_bytes),
                "flops_per_byte": _intensity(
                    pairs / mean if mean else None, dims.expert_flops_per_token, dims.expert_bytes
                ),
            }
        )
        size *= 2
    return found


def _round_robin(request: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T] order that takes one token of each request in turn; `request` [T] is sorted."""
    first = np.flatnonzero(np.r_[True, request[1:] != request[:-1]])
    lengths = np.diff(first, append=request.size)
    turn = np.arange(request.size) - np.repeat(first, lengths)
    return np.lexsort((request, turn))


def _choice(experts: NDArray[np.int32], num_experts: int) -> NDArray[np.float64]:
    """[L, E] share of the tokens that use each expert."""
    num_tokens, num_layers, _ = experts.shape
    share = np.zeros((num_layers, num_experts))
    for layer in range(num_layers):
        ids = experts[:, layer]
        share[layer] = np.bincount(ids[ids >= 0], minlength=num_experts) / num_tokens
    return share


def _mean_distinct(sample: Sample, order: NDArray[np.int64], batch_tokens: int) -> float:
    from placer.affinity.sequence_kernels import distinct

    num_layers, num_experts = sample.trace.num_layers, sample.trace.num_experts
    found = np.zeros(num_layers, np.int64)
    stamps = np.zeros((num_layers, num_experts), np.int64)
    distinct(sample.experts, order, batch_tokens, stamps, found)
    return float(found.mean() / (order.size // batch_tokens))


def _times(value: float, factor: float | None) -> float | None:
    return None if factor is None else float(value * factor)


def _intensity(
    tokens_per_expert: float | None, flops: float | None, size_bytes: int | None
) -> float | None:
    if tokens_per_expert is None or flops is None or size_bytes is None:
        return None
    return float(tokens_per_expert * flops / size_bytes)

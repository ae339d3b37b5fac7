"""The published routing formula of each family, written out in float64 NumPy.

A formula takes a router module (for its parameters and settings) and the hidden states [N, H] that
it was given, and returns expert ids [N, K] and gate weights [N, K], in any order of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Routed = tuple[NDArray[np.int64], Array]
Formula = Callable[[Any, Array], Routed]


def numpy_of(tensor: Any) -> Array:
    found: Array = tensor.detach().double().numpy()
    return found


def softmax(scores: Array) -> Array:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    whole: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return whole


def sigmoid(scores: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-scores))
    return found


def top(scores: Array, k: int) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def take(values: Array, ids: NDArray[np.int64]) -> Array:
    return np.take_along_axis(values, ids, axis=-1)


def logits_of(router: Any, hidden: Array) -> Array:
    return hidden @ numpy_of(router.weight).T


def softmax_then_top(router: Any, hidden: Array) -> Routed:
    """Qwen2-MoE, Qwen3-MoE, OLMoE: softmax over all experts, top k, renormalised if so set."""
    probabilities = softmax(logits_of(router, hidden))
    ids = top(probabilities, router.top_k)
    weights = take(probabilities, ids)
    if router.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights


def mixtral(router: Any, hidden: Array) -> Routed:
    """Softmax over all experts, top k, renormalised: the softmax over the top k logits."""
    return top_then_softmax(logits_of(router, hidden), router.top_k)


def top_then_softmax(logits: Array, k: int) -> Routed:
    ids = top(logits, k)
    return ids, softmax(take(logits, ids))


def granite(router: Any, hidden: Array) -> Routed:
    return top_then_softmax(logits_of(router, hidden), router.top_k)


def gpt_oss(router: Any, hidden: Array) -> Routed:
    return top_then_softmax(logits_of(router, hidden) + numpy_of(router.bias), router.top_k)


def jetmoe(router: Any, hidden: Array) -> Routed:
    return top_then_softmax(logits_of(router.layer, hidden), router.top_k)


def deepseek_v2(router: Any, hidden: Array) -> Routed:
    """Group-limited greedy: keep the groups with the highest single probability, then top k."""
    probabilities = softmax(logits_of(router, hidden))
    groups = probabilities.reshape(len(hidden), router.num_group, -1)
    kept = top(groups.max(axis=-1), router.topk_group)
    allowed = np.zeros(groups.shape[:2], bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    masked = np.where(allowed[:, :, None], groups, 0).reshape(probabilities.shape)
    ids = top(masked, router.top_k)
    return ids, take(probabilities, ids) * router.routed_scaling_factor


def deepseek_v3(router: Any, hidden: Array) -> Routed:
    """Sigmoid scores; the bias steers the choice only; a group counts by its best two."""
    scores = sigmoid(logits_of(router, hidden))
    choice = scores + numpy_of(router.e_score_correction_bias)
    groups = choice.reshape(len(hidden), router.num_group, -1)
    best_two = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
    kept = top(best_two, router.topk_group)
    allowed = np.zeros(groups.shape[:2], bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    masked = np.where(allowed[:, :, None], groups, -np.inf).reshape(scores.shape)
    ids = top(masked, router.top_k)
    weights = take(scores, ids)
    if router.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights * router.routed_scaling_factor


def phimoe(router: Any, hidden: Array) -> Routed:
    """SparseMixer in inference: each of the two picks is weighted among what is close to it."""
    scores = logits_of(router, hidden)
    ids, weights = [], []
    left = scores.copy()
    for _ in range(2):
        best = left.max(axis=-1, keepdims=True)
        pick = left.argmax(axis=-1)[:, None]
        scale = np.maximum(np.abs(scores), best)
        is_far = (best - scores) / scale > 2 * router.router_jitter_noise
        close = np.where(is_far, -np.inf, left)
        ids.append(pick)
        weights.append(take(softmax(close), pick))
        np.put_along_axis(left, pick, -np.inf, axis=-1)
    return np.concatenate(ids, axis=1), np.concatenate(weights, axis=1)


def llama4(router: Any, hidden: Array) -> Routed:
    """Top 1 of the logits, weighted by its sigmoid."""
    logits = logits_of(router, hidden)
    ids = top(logits, router.top_k)
    return ids, sigmoid(take(logits, ids))

"""Small problems, and what they cost counted one token at a time."""

from __future__ import annotations

import numpy as np

from solvers import Problem


def random_tokens(rng, num_tokens, num_layers, num_experts, top_k, *, gaps=False):
    """[T, L, K] distinct ids a row; with `gaps` some tokens use fewer, or none."""
    tokens = np.argsort(rng.random((num_tokens, num_layers, num_experts)), axis=2)[:, :, :top_k]
    tokens = tokens.astype(np.int64)
    if gaps:
        used = rng.integers(0, top_k + 1, (num_tokens, num_layers, 1))
        tokens[np.arange(top_k) >= used] = -1
    return tokens


def topic_tokens(seed, num_tokens=600, num_layers=5, num_experts=16, top_k=3, num_topics=4):
    """[T, L, K] tokens of hidden topics, each with experts of its own in every layer."""
    rng = np.random.default_rng([seed, 31])
    owner = np.stack([rng.permutation(num_experts) % num_topics for _ in range(num_layers)])
    topic = rng.integers(0, num_topics, num_tokens)
    liking = rng.normal(size=(num_tokens, num_layers, num_experts))
    liking += 2.5 * (owner[None] == topic[:, None, None])
    return np.argsort(-liking, axis=2, kind="stable")[:, :, :top_k]


def problem_of(tokens, num_experts, num_ranks, **options):
    """The problem that these tokens make."""
    num_layers = tokens.shape[1]
    load = np.stack(
        [
            np.bincount(tokens[:, i][tokens[:, i] >= 0], minlength=num_experts)
            for i in range(num_layers)
        ]
    )
    values = {
        "slots_per_rank": -(-num_experts // num_ranks),
        "ranks_per_node": num_ranks,
        "primary": tokens[:, :, 0],
    } | options
    return Problem(load=load.astype(np.float64), num_ranks=num_ranks, tokens=tokens, **values)


def group_of(slots, groups):
    """expert -> group of its only slot."""
    width = len(slots) // groups
    return {int(expert): i // width for i, expert in enumerate(slots) if expert >= 0}


def groups_used(row, where):
    """Groups that serve one token in one layer."""
    return {where[int(expert)] for expert in row if expert >= 0}


def balance(load, slots, num_ranks):
    """max / mean and mean square of rank load / mean."""
    ranks = [0.0] * num_ranks
    width = len(slots) // num_ranks
    for i, expert in enumerate(slots):
        if expert >= 0:
            ranks[i // width] += load[expert]
    mean = sum(load) / num_ranks
    return max(ranks) / mean, sum((r / mean) ** 2 for r in ranks) / num_ranks

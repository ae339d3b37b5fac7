"""Placements of every kind that a plan may be of."""

from __future__ import annotations

import numpy as np

from placer.placement import Placement, contiguous
from solvers import Problem, solve

KINDS = ("contiguous", "random", "optimised", "replicas", "unequal")


def make_placement(
    kind: str, num_layers: int, num_experts: int, num_ranks: int, ranks_per_node: int, seed: int = 0
) -> Placement:
    """A sound placement of one of `KINDS`."""
    rng = np.random.default_rng([seed, num_ranks, num_layers])
    share = -(-num_experts // num_ranks)
    plain = contiguous(num_layers, num_experts, num_ranks, share, ranks_per_node)
    if kind == "contiguous":
        return plain
    if kind == "optimised":
        return Placement(_solved(rng, num_layers, num_experts, num_ranks, share, ranks_per_node),
                         num_experts, num_ranks, ranks_per_node)  # fmt: skip
    rows = [_row(kind, rng, num_experts, num_ranks, share) for _ in range(num_layers)]
    placement = Placement(np.stack(rows), num_experts, num_ranks, ranks_per_node)
    assert placement.problems() == []
    return placement


def _row(
    kind: str, rng: np.random.Generator, num_experts: int, num_ranks: int, share: int
) -> np.ndarray:
    """Slots of one layer."""
    order = rng.permutation(num_experts)
    if kind == "random":
        return _filled([list(part) for part in np.array_split(order, num_ranks)], share)
    if kind == "unequal":  # the last rank holds one expert, or none at all, in each layer
        if num_ranks == 1:
            return _filled([list(order)], num_experts + 1)
        few = int(rng.integers(0, 2))
        parts = [*np.array_split(order[few:], num_ranks - 1), order[:few]]
        return _filled([list(part) for part in parts], -(-num_experts // (num_ranks - 1)) + 1)
    parts = [list(part) for part in np.array_split(order, num_ranks)]
    for part in parts:  # one copy more on each rank, of an expert that it lacks
        lacking = np.setdiff1d(order, part)
        if lacking.size:
            part.append(rng.choice(lacking))
    return _filled(parts, share + 1)


def _filled(parts: list[list[int]], width: int) -> np.ndarray:
    return np.concatenate([[*part, *[-1] * (width - len(part))] for part in parts]).astype(np.int64)


def _solved(
    rng: np.random.Generator,
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    share: int,
    ranks_per_node: int,
) -> np.ndarray:
    """What the local search makes of tokens with topics."""
    topic = rng.integers(0, num_ranks, 400)
    of_topic = [rng.permutation(num_experts) for _ in range(num_layers)]
    tokens = np.stack(
        [
            np.stack([layer[(topic * 2 + i + rng.integers(0, 2, 400)) % num_experts] for layer in
                      of_topic], axis=1)
            for i in (0, 3)
        ],
        axis=2,
    )  # fmt: skip
    load = np.stack(
        [np.bincount(tokens[:, i].reshape(-1), minlength=num_experts) for i in range(num_layers)]
    ).astype(float)
    together = np.zeros((num_layers, num_experts, num_experts))
    for i in range(num_layers):
        np.add.at(together[i], (tokens[:, i, 0], tokens[:, i, 1]), 1)
    together += together.transpose(0, 2, 1)
    problem = Problem(
        load=load, num_ranks=num_ranks, slots_per_rank=share, ranks_per_node=ranks_per_node,
        coactivation=together, tokens=tokens, home=topic,
    )  # fmt: skip
    return solve(problem, "local_search", seed=0).placement

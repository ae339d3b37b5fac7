"""Random traces and placements, awkward on purpose."""

from __future__ import annotations

import numpy as np

from placer.placement import Placement
from placer.trace.model import Trace


def random_trace(
    rng,
    *,
    num_tokens=60,
    num_layers=4,
    num_experts=8,
    top_k=3,
    num_requests=5,
    weights=False,
    home_ranks=0,
    steps=0,
    variable_k=True,
):
    experts = np.full((num_tokens, num_layers, top_k), -1, np.int16)
    gates = np.zeros((num_tokens, num_layers, top_k), np.float32)
    for t in range(num_tokens):
        for l in range(num_layers):  # noqa: E741
            k = int(rng.integers(0, top_k + 1)) if variable_k else top_k
            experts[t, l, :k] = rng.choice(num_experts, size=k, replace=False)
            gates[t, l, :k] = rng.integers(1, 4, size=k) / 8  # ties on purpose
    return Trace(
        experts=experts,
        num_experts=num_experts,
        layer_ids=np.arange(num_layers, dtype=np.int64),
        request=rng.integers(3, 3 + num_requests, num_tokens).astype(np.int64),
        position=np.arange(num_tokens, dtype=np.int64),
        phase=np.ones(num_tokens, np.uint8),
        step=rng.integers(0, steps, num_tokens).astype(np.int64) if steps else None,
        weights=gates if weights else None,
        home=rng.integers(0, home_ranks, num_tokens).astype(np.int64) if home_ranks else None,
    )


def random_placement(
    rng, *, num_layers=4, num_experts=8, num_ranks=4, slots_per_rank=3, ranks_per_node=2
):
    """Every expert somewhere, copies in a random part of the spare slots, the rest empty."""
    table = np.full((num_layers, num_ranks, slots_per_rank), -1, np.int64)
    for l in range(num_layers):  # noqa: E741
        free = rng.permutation(np.repeat(np.arange(num_ranks), slots_per_rank))
        filled = [set() for _ in range(num_ranks)]
        for expert, rank in zip(rng.permutation(num_experts), free, strict=False):
            filled[rank].add(int(expert))
        for rank in free[num_experts:]:
            expert = int(rng.integers(-1, num_experts))
            if expert >= 0:
                filled[rank].add(expert)  # a copy that is there already changes nothing
        for rank in range(num_ranks):
            experts = rng.permutation(sorted(filled[rank]))
            places = rng.choice(slots_per_rank, size=experts.size, replace=False)
            table[l, rank, places] = experts
    return Placement(table.reshape(num_layers, -1), num_experts, num_ranks, ranks_per_node)


def chunks_of(trace, sizes):
    """The trace cut into chunks of these sizes, the rest at the end."""
    index = np.arange(trace.num_tokens)
    start = 0
    for size in [*sizes, trace.num_tokens]:
        part = (index >= start) & (index < start + size)
        if part.any():
            yield trace.select(part)
        start += size

"""The kernel of `solvers.bounds.relaxation`: projection onto (1). See there for symbols."""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled

_BISECTIONS = 50


def _project(
    blocks: Any, y: Any, dual: Any, capacity: Any, num_ranks: Any, penalty: Any, relaxing: Any
) -> Any:
    size = blocks.shape[0]
    num_experts = capacity * num_ranks
    largest = float(size // num_ranks)
    asked = np.empty_like(y)
    for i in range(size):
        for j in range(size):
            apart = blocks[i, j] - y[i, j]
            asked[i, j] = y[i, j] + relaxing * apart + dual[i, j] / penalty
    # without what does not change row sums, and what does pushed out of reach
    centred = asked.copy()
    for first in range(0, size, num_experts):
        for j in range(size):
            total = 0.0
            for i in range(first, first + num_experts):
                total += centred[i, j]
            for i in range(first, first + num_experts):
                centred[i, j] -= total / num_experts
    for first in range(0, size, num_experts):
        for i in range(size):
            total = 0.0
            for j in range(first, first + num_experts):
                total += centred[i, j]
            inside = first <= i and i < first + num_experts
            away = 4.0 * largest / num_experts if inside else 0.0
            for j in range(first, first + num_experts):
                centred[i, j] -= total / num_experts + away
    values, vectors = np.linalg.eigh(centred)
    wanted = largest * (num_ranks - 1)
    low, high = values[0] - largest, values[size - 1]
    for _ in range(_BISECTIONS):
        shift = 0.5 * (low + high)
        total = 0.0
        for value in values:
            total += min(max(value - shift, 0.0), largest)
        if total > wanted:
            low = shift
        else:
            high = shift
    rank = 0
    for value in values:
        if value > high:
            rank += 1
    kept = np.ascontiguousarray(vectors[:, size - rank :])
    scaled = kept.copy()
    top = 0.0
    for column in range(rank):
        value = values[size - rank + column]
        part = min(value - high, largest)
        if column >= rank - (num_ranks - 1):
            top += value - part
        for i in range(size):
            scaled[i, column] *= part
    found = np.dot(scaled, kept.T)
    for i in range(size):
        for j in range(size):
            value = found[i, j] + 1.0 / num_ranks
            y[i, j] = value
            dual[i, j] = penalty * (asked[i, j] - value)
    return penalty * largest * top, rank


project = compiled(_project)

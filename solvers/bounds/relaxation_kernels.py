"""Kernels of `solvers.bounds.relaxation`: projection, triangles, separation. See there for symbols.

Entries of M are numbered: (i, j) with i < j of layer l is l E^2 + i E + j, and (i, j) of layers p
and p + 1 is (L + p) E^2 + i E + j. A triangle is three numbers: x[p] + x[q] - x[r] <= 1.
"""

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


def _tighten(target: Any, weight: Any, p: Any, q: Any, r: Any, multiplier: Any) -> Any:
    for t in range(p.size):
        a, b, c = p[t], q[t], r[t]
        violation = (
            min(max(target[a], 0.0), 1.0)
            + min(max(target[b], 0.0), 1.0)
            - min(max(target[c], 0.0), 1.0)
            - 1.0
        )
        step = 1.0 / (1.0 / weight[a] + 1.0 / weight[b] + 1.0 / weight[c])
        new = max(0.0, multiplier[t] + step * violation)
        change = new - multiplier[t]
        if change != 0.0:
            multiplier[t] = new
            target[a] -= change / weight[a]
            target[b] -= change / weight[b]
            target[c] += change / weight[c]


def _triangles_within(same: Any, offset: Any, least: Any, found: Any, violation: Any) -> Any:
    num_experts = same.shape[0]
    count = 0
    for i in range(num_experts):
        for k in range(i + 1, num_experts):
            worst, at = least, -1
            for j in range(num_experts):
                value = same[i, j] + same[k, j] - same[i, k] - 1.0
                if value > worst and j != i and j != k:
                    worst, at = value, j
            if at >= 0:
                found[count, 0] = offset + min(i, at) * num_experts + max(i, at)
                found[count, 1] = offset + min(k, at) * num_experts + max(k, at)
                found[count, 2] = offset + i * num_experts + k
                violation[count] = worst
                count += 1
    return count


def _triangles_between(
    same: Any, next_: Any, offset: Any, start: Any, transposed: Any, least: Any, found: Any,
    violation: Any, count: Any,
) -> Any:  # fmt: skip
    num_experts = same.shape[0]
    worst, at = np.empty(3), np.empty(3, np.int64)
    for i in range(num_experts):
        for k in range(i + 1, num_experts):
            worst[:], at[:] = least, -1
            here = same[i, k]
            for j in range(num_experts):
                one, other = next_[i, j], next_[k, j]
                if one + other - here - 1.0 > worst[0]:
                    worst[0], at[0] = one + other - here - 1.0, j
                if here + one - other - 1.0 > worst[1]:
                    worst[1], at[1] = here + one - other - 1.0, j
                if here + other - one - 1.0 > worst[2]:
                    worst[2], at[2] = here + other - one - 1.0, j
            within = offset + i * num_experts + k
            for kind in range(3):
                j = at[kind]
                if j < 0:
                    continue
                if transposed:
                    first, second = start + j * num_experts + i, start + j * num_experts + k
                else:
                    first, second = start + i * num_experts + j, start + k * num_experts + j
                if kind == 0:
                    found[count, 0], found[count, 1], found[count, 2] = first, second, within
                elif kind == 1:
                    found[count, 0], found[count, 1], found[count, 2] = within, first, second
                else:
                    found[count, 0], found[count, 1], found[count, 2] = within, second, first
                violation[count] = worst[kind]
                count += 1
    return count


project = compiled(_project)
tighten = compiled(_tighten)
triangles_within = compiled(_triangles_within)
triangles_between = compiled(_triangles_between)

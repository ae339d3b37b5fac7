"""Kernels of `solvers.bounds.stars`: sweeps over stars and their separation. See there for symbols.

An expert is a number: expert i of layer l is l E + i. A star is a row of six: its centre, its
leaves, then -1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled

_POSSIBLE = 0.02  # a leaf shares so much with its centre


def _fill_entries(stars: Any, num_experts: Any, num_layers: Any, entries: Any) -> Any:
    square = num_experts * num_experts
    at = 0
    for star in stars:
        last = 1
        while last < star.size and star[last] >= 0:
            last += 1
        for i in range(last):
            for j in range(i + 1, last):
                low, high = min(star[i], star[j]), max(star[i], star[j])
                layer = low // num_experts
                block = layer if high // num_experts == layer else num_layers + layer
                entries[at] = (
                    block * square + (low % num_experts) * num_experts + high % num_experts
                )
                at += 1


def _add_coefficients(entries: Any, leaves: Any, multiplier: Any, total: Any) -> Any:
    first = 0
    for star in range(leaves.size):
        middle = first + leaves[star]
        end = middle + leaves[star] * (leaves[star] - 1) // 2
        if multiplier[star] > 0.0:
            for at in range(first, middle):
                total[entries[at]] += multiplier[star]
            for at in range(middle, end):
                total[entries[at]] -= multiplier[star]
        first = end


def _tighten(target: Any, inverse: Any, entries: Any, leaves: Any, multiplier: Any) -> Any:
    first = 0
    for star in range(leaves.size):
        middle = first + leaves[star]
        end = middle + leaves[star] * (leaves[star] - 1) // 2
        violation, slope = -1.0, 0.0
        for at in range(first, middle):
            violation += min(max(target[entries[at]], 0.0), 1.0)
            slope += inverse[entries[at]]
        for at in range(middle, end):
            violation -= min(max(target[entries[at]], 0.0), 1.0)
            slope += inverse[entries[at]]
        new = max(0.0, multiplier[star] + violation / slope)
        change = new - multiplier[star]
        if change != 0.0:
            multiplier[star] = new
            for at in range(first, middle):
                target[entries[at]] -= change * inverse[entries[at]]
            for at in range(middle, end):
                target[entries[at]] += change * inverse[entries[at]]
        first = end


def _triangles_within(same: Any, here: Any, least: Any, found: Any, violation: Any) -> Any:
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
                found[count, 0], found[count, 1], found[count, 2] = here + at, here + i, here + k
                violation[count] = worst
                count += 1
    return count


def _triangles_between(
    same: Any, next_: Any, here: Any, there: Any, least: Any, found: Any, violation: Any, count: Any
) -> Any:
    num_experts = same.shape[0]
    worst, at = np.empty(3), np.empty(3, np.int64)
    for i in range(num_experts):
        for k in range(i + 1, num_experts):
            worst[:], at[:] = least, -1
            apart = same[i, k]
            for j in range(num_experts):
                one, other = next_[i, j], next_[k, j]
                if one + other - apart - 1.0 > worst[0]:
                    worst[0], at[0] = one + other - apart - 1.0, j
                if apart + one - other - 1.0 > worst[1]:
                    worst[1], at[1] = apart + one - other - 1.0, j
                if apart + other - one - 1.0 > worst[2]:
                    worst[2], at[2] = apart + other - one - 1.0, j
            for kind in range(3):
                j = there + at[kind]
                if at[kind] < 0:
                    continue
                if kind == 0:
                    found[count, 0], found[count, 1], found[count, 2] = j, here + i, here + k
                elif kind == 1:
                    found[count, 0], found[count, 1], found[count, 2] = here + i, here + k, j
                else:
                    found[count, 0], found[count, 1], found[count, 2] = here + k, here + i, j
                violation[count] = worst[kind]
                count += 1
    return count


def _larger_stars(same: Any, here: Any, least: Any, found: Any, violation: Any) -> Any:
    size, most = same.shape[0], found.shape[1] - 1
    near, gain = np.empty(size, np.int64), np.empty(size)
    leaves = np.empty(most, np.int64)
    count = 0
    for centre in range(size):
        number = 0
        for i in range(size):
            if i != centre and same[centre, i] > _POSSIBLE:
                near[number] = i
                number += 1
        for start in range(number):
            if most * same[centre, near[start]] < 1.0:
                continue  # the leaf nearest to the centre of a violated star is nearer than this
            for other in range(number):
                gain[other] = same[centre, near[other]]
            leaf, length, total = start, 0, -1.0
            while leaf >= 0 and length < most:
                leaves[length] = near[leaf]
                length += 1
                total += gain[leaf]
                best, leaf = 1e-6, -1
                for other in range(number):
                    gain[other] -= same[near[other], leaves[length - 1]]
                    if gain[other] > best:
                        best, leaf = gain[other], other
            if length > 2 and total > least and count < violation.size:
                found[count, 0] = here + centre
                found[count, 1:] = -1
                for i in range(length):
                    found[count, i + 1] = here + leaves[i]
                violation[count] = total
                count += 1
    return count


fill_entries = compiled(_fill_entries)
add_coefficients = compiled(_add_coefficients)
tighten = compiled(_tighten)
triangles_within = compiled(_triangles_within)
triangles_between = compiled(_triangles_between)
larger_stars = compiled(_larger_stars)

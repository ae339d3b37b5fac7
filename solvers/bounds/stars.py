"""Stars: cuts that every placement keeps and the doubly nonnegative relaxation breaks.

M[u, v] = 1 if experts u and v share a rank. A star is a centre u and a set T of two to five leaves:

    (3)  sum over t in T of M_ut  -  sum over pairs t, t' in T of M_tt'  <=  1

since with k leaves on the centre's rank the left side is at most k - k (k - 1) / 2 <= 1. Two leaves
make a triangle: sharing is transitive. All experts are of one layer or of two neighbouring ones.

Separation: for each pair of experts the most violated triangles; larger stars by greedy growth from
each centre and each first leaf. O(E^3) a layer both.

Source: the 2-partition inequalities with one expert on one side, of Groetschel and Wakabayashi, A
cutting plane algorithm for a clustering problem, Mathematical Programming 45, 1989.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import stars_kernels as kernels

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Rows = NDArray[np.int32]

MOST_LEAVES = 5
_LEAST_VIOLATION = 0.01
_TRIANGLES_WITHIN, _TRIANGLES_BETWEEN = 12, 48  # new ones per separation, times E
_LARGER = 12
_KEPT_ROUNDS = 8  # of separation, that a star without a multiplier survives
_MIX = np.random.default_rng(0).integers(2**62, size=MOST_LEAVES + 1) | 1


@dataclass(frozen=True, eq=False)
class Stars:
    """Some stars and their multipliers.

    Attributes:
        members: [N, 6] centre, leaves, then -1; expert i of layer l is l E + i.
        leaves: [N] how many.
        entries: those of M that they are about, star by star: centre and leaf, then leaf and leaf.
            (i, j) with i < j of layer l is l E^2 + i E + j; (i, j) of layers l and l + 1 is
            (L + l) E^2 + i E + j.
        multiplier: [N] mu.
        age: [N] separations since the multiplier was last positive.
    """

    members: Rows
    leaves: NDArray[np.int64]
    entries: Rows
    multiplier: Singles
    age: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        members: Rows,
        num_layers: int,
        num_experts: int,
        multiplier: Singles | None = None,
        age: NDArray[np.int64] | None = None,
    ) -> Stars:
        """Stars of the experts of L layers; multipliers and ages are zero unless given."""
        leaves = (members >= 0).sum(axis=1) - 1
        entries = np.empty(int((leaves * (leaves + 1) // 2).sum()), np.int32)
        kernels.fill_entries(members, num_experts, num_layers, entries)
        return cls(
            members,
            leaves,
            entries,
            np.zeros(len(members), np.float32) if multiplier is None else multiplier,
            np.zeros(len(members), np.int64) if age is None else age,
        )

    def frozen(self) -> Stars:
        """A copy, which a sweep over this does not change."""
        return replace(self, multiplier=self.multiplier.copy())

    def coefficients(self, num_entries: int) -> Floats:
        """[num_entries] T mu."""
        total = np.zeros(num_entries)
        kernels.add_coefficients(self.entries, self.leaves, self.multiplier, total)
        return total

    def tighten(self, target: Singles, inverse: Singles) -> None:
        """One sweep of Hildreth's method: exact ascent in each multiplier in turn.

        Args:
            target: entries of M before they are clipped to [0, 1]; changed.
            inverse: of the weight of each entry.
        """
        kernels.tighten(target, inverse, self.entries, self.leaves, self.multiplier)

    def renewed(self, found: Rows, num_layers: int, num_experts: int) -> Stars:
        """Without those that have long been idle, and with those that were found."""
        age = np.where(self.multiplier > 0, 0, self.age + 1)
        kept = age < _KEPT_ROUNDS
        members = np.concatenate([self.members[kept], found])
        first = _distinct(members)
        multiplier = np.concatenate([self.multiplier[kept], np.zeros(len(found), np.float32)])
        age = np.concatenate([age[kept], np.zeros(len(found), np.int64)])
        return Stars.of(members[first], num_layers, num_experts, multiplier[first], age[first])


def no_stars() -> Rows:
    """[0, 6]."""
    return np.zeros((0, MOST_LEAVES + 1), np.int32)


def violated_within(same: Singles, layer: int) -> Rows:
    """[n, 6] the most violated triangles of a layer.

    Args:
        same: [E, E] the layer's block of M.
        layer: its number.
    """
    num_experts = len(same)
    found, violation = _room(num_experts * (num_experts - 1) // 2)
    here, least = layer * num_experts, np.float32(_LEAST_VIOLATION)
    count = kernels.triangles_within(same, here, least, found, violation)
    return _most(found[:count], violation[:count], _TRIANGLES_WITHIN * num_experts)


def violated_between(same: Singles, between: Singles, after: Singles, layer: int) -> Rows:
    """[n, 6] the most violated triangles with experts of a layer and the next one.

    Args:
        same, between, after: [E, E] blocks of M: the layer, the layer and the next, the next.
        layer: its number.
    """
    num_experts = len(same)
    found, violation = _room(3 * num_experts * (num_experts - 1))
    here, least = layer * num_experts, np.float32(_LEAST_VIOLATION)
    there = here + num_experts
    count = kernels.triangles_between(same, between, here, there, least, found, violation, 0)
    back = np.ascontiguousarray(between.T)
    count = kernels.triangles_between(after, back, there, here, least, found, violation, count)
    return _most(found[:count], violation[:count], _TRIANGLES_BETWEEN * num_experts)


def larger_violated(same: Singles, layer: int, num_experts: int) -> Rows:
    """[n, 6] violated stars of three to five leaves.

    Args:
        same: [bE, bE] blocks of M from this layer on.
        layer: its number.
        num_experts: E.
    """
    found, violation = _room(len(same) ** 2)
    here, least = layer * num_experts, np.float32(_LEAST_VIOLATION)
    count = kernels.larger_stars(same, here, least, found, violation)
    found, violation = found[:count], violation[:count]
    first = _distinct(found)
    return _most(found[first], violation[first], _LARGER * num_experts)


def _room(number: int) -> tuple[Rows, Singles]:
    return np.full((number, MOST_LEAVES + 1), -1, np.int32), np.empty(number, np.float32)


def _distinct(members: Rows) -> NDArray[np.intp]:
    """Indices of one star of each kind, shuffled, which makes sweeps converge sooner.

    The order of leaves does not matter.
    """
    ordered = members.astype(np.int64)
    ordered[:, 1:].sort(axis=1)
    _, first = np.unique((ordered * _MIX).sum(axis=1), return_index=True)
    return first


def _most(found: Rows, violation: Singles, number: int) -> Rows:
    """The `number` most violated ones."""
    if len(found) > number:
        found = found[np.argpartition(-violation, number)[:number]]
    return found.copy()

"""Whether a layer's experts fall into groups that fire together, judged on other requests.

Shape letters: L layers, E experts, G groups of equally many experts, J groups of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.gaps import spaced
from placer.affinity.jackknife import estimate
from placer.affinity.sample import NUM_GROUPS, Sample

Array = NDArray[np.float64]

_MOST_LAYERS = 8


def clusterability(sample: Sample, num_groups: Sequence[int]) -> list[dict[str, Any]]:
    """Share of co-activated pairs inside G balanced groups that other requests suggest.

    The groups of one half of the requests (steepest-descent swaps from contiguous groups) are
    judged by the other half, in both directions, over at most 8 evenly spaced layers.

    Returns:
        of each G: `num_ranks` G, `kept` with interval (over the judged requests), `kept_at_random`:
        the expectation of groups drawn at random, `kept_by_load`: what the same groups would keep
        if experts fired together as their loads alone say, `kept_bound`: no groups keep more (of
        the sample), and `scaled` = (kept - random) / (1 - random).
    """
    num_experts = sample.trace.num_experts
    layers = spaced(sample.trace.num_layers, _MOST_LAYERS)
    tables = [pair_counts(sample, layer) for layer in layers]
    found = []
    half = np.arange(NUM_GROUPS) % 2
    for ranks in num_groups:
        if ranks == 1:  # nothing is apart
            continue
        kept, total, by_load = np.zeros(NUM_GROUPS), np.zeros(NUM_GROUPS), 0.0
        bound = 0.0
        capacity = -(-num_experts // ranks)
        for table in tables:
            for side in (0, 1):
                groups = balanced_groups(table[half != side].sum(axis=0), ranks)
                same = groups[:, None] == groups[None, :]
                judged = table[half == side]
                kept[half == side] += judged[:, same].sum(axis=1)
                total[half == side] += judged.sum(axis=(1, 2))
                by_load += _by_load(judged.sum(axis=0), same)
            whole = np.sort(table.sum(axis=0), axis=1)
            bound += float(whole[:, num_experts - (capacity - 1) :].sum()) if capacity > 1 else 0.0
        if not total.sum():
            continue
        rest = total.sum() - total
        usable = (total > 0) & (rest > 0)
        sizes = np.array([part.size for part in np.array_split(np.arange(num_experts), ranks)])
        random = float((sizes * (sizes - 1)).sum() / (num_experts * (num_experts - 1)))
        value = float(kept.sum() / total.sum())
        found.append(
            {
                "num_ranks": ranks,
                "kept": estimate(value, (kept.sum() - kept)[usable] / rest[usable]),
                "kept_at_random": random,
                "kept_by_load": by_load / float(total.sum()),
                "kept_bound": bound / float(total.sum()),
                "scaled": (value - random) / (1 - random),
            }
        )
    return found


def pair_counts(sample: Sample, layer: int) -> Array:
    """[J, E, E] tokens of each group that chose both of two different experts of a layer."""
    size = sample.trace.num_experts
    ids = sample.experts[:, layer].astype(np.int64)
    counts = np.zeros(NUM_GROUPS * size * size)
    for i in range(ids.shape[1]):
        for j in range(i + 1, ids.shape[1]):
            both = (ids[:, i] >= 0) & (ids[:, j] >= 0)
            index = (sample.group_of_token[both] * size + ids[both, i]) * size + ids[both, j]
            counts += np.bincount(index, minlength=counts.size)
    table = counts.reshape(NUM_GROUPS, size, size)
    symmetric: Array = table + table.transpose(0, 2, 1)
    return symmetric


def balanced_groups(weight: Array, num_groups: int) -> NDArray[np.int64]:
    """[E] groups of equal size (to one) with much weight inside: the best swap, until none helps.

    Args:
        weight: [E, E] symmetric, its diagonal is not looked at.
        num_groups: G.

    O(E^2) a swap. No guarantee beyond a local optimum.
    """
    size = weight.shape[0]
    weight = weight - np.diag(np.diag(weight))
    groups = np.empty(size, np.int64)
    for number, part in enumerate(np.array_split(np.arange(size), num_groups)):
        groups[part] = number
    to_group = np.stack([weight[:, groups == g].sum(axis=1) for g in range(num_groups)], axis=1)
    expert = np.arange(size)
    while True:
        # swapping i and j gains what both have with their new groups, less what they leave
        towards = to_group[:, groups] - to_group[expert, groups][:, None]
        gain = towards + towards.T - 2 * weight
        gain[groups[:, None] == groups[None, :]] = 0
        i, j = divmod(int(gain.argmax()), size)
        if gain[i, j] <= 1e-9 * max(1.0, float(weight.sum())):
            return groups
        old, new = groups[i], groups[j]
        to_group[:, old] += weight[:, j] - weight[:, i]
        to_group[:, new] += weight[:, i] - weight[:, j]
        groups[i], groups[j] = new, old


def _by_load(pairs: Array, same: NDArray[np.bool_]) -> float:
    """Pairs inside groups if experts met in proportion to their loads: as many pairs in all."""
    load = pairs.sum(axis=1)
    product = np.outer(load, load)
    np.fill_diagonal(product, 0)
    return float(pairs.sum() * product[same].sum() / product.sum()) if product.sum() else 0.0

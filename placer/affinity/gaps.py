"""How far affinity reaches: information between the primary experts of layers g apart.

Shape letters: L layers, E experts, J groups of requests, g gap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.information import chance_information, entropy, mutual_information
from placer.affinity.jackknife import estimate
from placer.affinity.sample import NUM_GROUPS, Sample

Array = NDArray[np.float64]

GAPS = (1, 2, 3, 4, 8, 16, 32)
_MOST_PAIRS = 16  # of layers per gap, evenly spaced


def information_by_gap(sample: Sample) -> list[dict[str, Any]]:
    """Adjusted normalised mutual information of primary experts, by the gap between layers.

    (I - C) / (min(H, H') - C), as `primary_information` has it for g = 1; the mean over at most 16
    evenly spaced pairs of layers. Where a group of requests is left out, C is scaled by the tokens.

    Returns:
        of each gap below L: `gap`, `nmi` with interval.
    """
    primary = sample.trace.primary()
    found = []
    for gap in (g for g in GAPS if g < sample.trace.num_layers):
        values = np.stack(
            [
                _adjusted(pair_tables(sample, primary, layer, layer + gap))
                for layer in spaced(sample.trace.num_layers - gap, _MOST_PAIRS)
            ]
        )
        known = values[np.isfinite(values[:, 0])]
        mean = known.mean(axis=0) if known.size else np.full(values.shape[1], np.nan)
        present = np.bincount(sample.group_of_token, minlength=NUM_GROUPS) > 0
        found.append({"gap": gap, "nmi": estimate(float(mean[0]), mean[1:][present])})
    return found


def scaled_affinity(sample: Sample) -> dict[str, Any]:
    """How surely the likeliest next expert follows: 0 = each equally likely, 1 = always.

    s = (m - 1/E) / (1 - 1/E), where m is the share of tokens whose next primary expert is the one
    that was likeliest after their primary expert in the other half of the requests. Mean over
    layers and over both directions. ExFlow (Yao et al., IPDPS 2024) reads affinity off the same
    conditional probabilities P(next expert | expert); scaling and the held-out half are ours.

    Returns:
        `held_out` with interval, and `by_load`: the same when the overall likeliest next expert is
        guessed, whatever the token's expert.
    """
    primary = sample.trace.primary()
    num_experts = sample.trace.num_experts
    right = np.zeros(NUM_GROUPS)
    by_load, total = np.zeros(NUM_GROUPS), np.zeros(NUM_GROUPS)
    half = np.arange(NUM_GROUPS) % 2
    for layer in range(sample.trace.num_layers - 1):
        tables = pair_tables(sample, primary, layer, layer + 1)
        for side in (0, 1):
            fitted = tables[half != side].sum(axis=0)
            judged = tables[half == side]
            likeliest = fitted.argmax(axis=1)
            likeliest[fitted.sum(axis=1) == 0] = fitted.sum(axis=0).argmax()
            right[half == side] += judged[:, np.arange(num_experts), likeliest].sum(axis=1)
            by_load[half == side] += judged[:, :, fitted.sum(axis=0).argmax()].sum(axis=1)
            total[half == side] += judged.sum(axis=(1, 2))

    def scale(share: Any) -> Any:
        return (share - 1 / num_experts) / (1 - 1 / num_experts)

    if not total.sum() or num_experts == 1:
        return {"held_out": estimate(float("nan"), []), "by_load": None}
    rest = total.sum() - total
    usable = (total > 0) & (rest > 0)
    without = scale((right.sum() - right)[usable] / rest[usable])
    return {
        "held_out": estimate(scale(float(right.sum() / total.sum())), without),
        "by_load": scale(float(by_load.sum() / total.sum())),
    }


def pair_tables(sample: Sample, primary: NDArray[np.integer], layer: int, other: int) -> Array:
    """[J, E, E] tokens of each group by their primary experts in two layers."""
    size = sample.trace.num_experts
    a, b = primary[:, layer].astype(np.int64), primary[:, other].astype(np.int64)
    both = (a >= 0) & (b >= 0)
    index = (sample.group_of_token[both] * size + a[both]) * size + b[both]
    counts = np.bincount(index, minlength=NUM_GROUPS * size * size)
    return counts.reshape(NUM_GROUPS, size, size).astype(np.float64)


def spaced(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spaced."""
    if count <= most:
        return list(range(count))
    return sorted({int(i) for i in np.linspace(0, count - 1, most).round()})


def _adjusted(tables: Array) -> Array:
    """[1 + J] adjusted information of the sum of `tables` [J, E, E], and of it without each."""
    whole = tables.sum(axis=0)
    tokens = whole.sum()
    if tokens == 0:
        return np.full(1 + len(tables), np.nan)
    rows, columns = whole.sum(axis=1) / tokens, whole.sum(axis=0) / tokens
    calm = (1 - 1 / whole.shape[0]) ** 2
    chance = calm * chance_information(rows, columns, float(tokens))
    values = []
    for table in (whole, *(whole - part for part in tables)):
        left = table.sum()
        if left == 0:
            values.append(np.nan)
            continue
        raw = float(mutual_information(table))
        smaller = min(
            float(entropy(table.sum(axis=1) / left)), float(entropy(table.sum(axis=0) / left))
        )
        expected = chance * tokens / left
        values.append((raw - expected) / (smaller - expected) if smaller > expected else np.nan)
    return np.array(values)

"""How much the expert of one layer says about the expert of the next, in bits.

Counts of a finite trace look dependent even where nothing is: the plain ("plug-in") mutual
information of independent layers is above 0, by several bits where tokens are few and experts
many. So three figures stand side by side:

- raw: the plug-in value, what papers quote;
- corrected: raw minus what independent layers with the same loads and the same number of tokens
  would show. Unlike Miller and Madow's constant, this holds for a handful of tokens too;
- held out: the bits that the affinity of some requests saves in predicting others. Only this one
  also survives that the tokens of one request resemble each other.

Shape letters: L layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from placer.affinity.model import Affinity

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Information:
    """Mutual information of consecutive layers, bits per pair of experts; nan without tokens.

    Attributes:
        raw_bits: [L-1] plug-in value I.
        chance_bits: [L-1] its expectation C where layers are independent.
        corrected_bits: [L-1] I - C; about 0 where layers are independent.
        nmi: [L-1] I / min(H_l, H_{l+1}), from 0 to 1.
        corrected_nmi: [L-1] (I - C) / (min(H_l, H_{l+1}) - C), the adjusted mutual information.
    """

    raw_bits: Array
    chance_bits: Array
    corrected_bits: Array
    nmi: Array
    corrected_nmi: Array


def all_pairs_information(affinity: Affinity) -> Information:
    """Information of any expert of a token about any of its experts in the next layer.

    Even a router that always follows one set of K experts by one other set stays below nmi = 1
    when K > 1, because the experts inside a set are not told apart.
    """
    one_over_k = _mean_one_over_k(affinity)
    tokens = affinity.affinity.sum(axis=(1, 2))
    spread = affinity.num_experts * one_over_k
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = tokens / (one_over_k[:-1] * one_over_k[1:])
        # choosing K distinct experts varies less than K draws, by (E - K) / E
        calm = (1 - 1 / spread[:-1]) * (1 - 1 / spread[1:])
    return _information(affinity.affinity, pairs, calm)


def primary_information(affinity: Affinity) -> Information:
    """Information of a token's primary expert about its primary expert in the next layer."""
    table = affinity.primary_pairs.astype(np.float64)
    calm = np.full(len(table), (1 - 1 / affinity.num_experts) ** 2)
    return _information(table, table.sum(axis=(1, 2)), calm)


def held_out_information(fitted: Affinity, unseen: Affinity) -> Array:
    """[L-1] bits per pair that the affinity of `fitted` saves in predicting `unseen`.

    The mean over pairs (e, f) of `unseen` of log2 q(e, f) / (q(e) q(f)), where
    q = (1-s) p + s p(e) p(f) comes from `fitted` and is drawn towards independence by
    s = chance / raw, the share of the fitted information that chance explains. 0 or less where
    the affinity does not carry over; nan where either has no tokens.

    Make the parts of different requests: tokens of one request are alike.
    """
    information = all_pairs_information(fitted)
    tokens = fitted.affinity.sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        shrink = information.chance_bits / information.raw_bits
        shrink = np.clip(np.nan_to_num(shrink, nan=1.0), 1 / (tokens + 1), 1)[:, None, None]
        joint = fitted.affinity / tokens[:, None, None]
        weight = unseen.affinity / unseen.affinity.sum(axis=(1, 2), keepdims=True)
        independent = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
        gain = np.where(independent > 0, (1 - shrink) * joint / independent + shrink, 1.0)
        saved: Array = (weight * np.log2(gain)).sum(axis=(1, 2))
    return np.where(tokens > 0, saved, np.nan)


def mutual_information(table: NDArray[np.number]) -> Array:
    """[...] plug-in mutual information of tables [..., E, E], bits; nan where a table is empty.

    I = sum over e, f of p(e, f) log2 (p(e, f) / (p(e) p(f))).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = table / table.sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
    rows, columns = entropy(joint.sum(axis=-1)), entropy(joint.sum(axis=-2))
    both = entropy(joint.reshape(*joint.shape[:-2], joint.shape[-1] ** 2))
    bits: Array = np.maximum(rows + columns - both, 0.0)
    return bits


def entropy(probability: Array) -> Array:
    """[...] entropy of distributions [..., N], bits."""
    logarithm = np.log2(np.where(probability > 0, probability, 1.0))
    bits: Array = -(probability * logarithm).sum(axis=-1)
    return bits


def conditional(table: NDArray[np.number]) -> Array:
    """P(next expert | expert) of tables [L-1, E, E]: rows sum to 1, or are 0 without tokens."""
    total = table.sum(axis=-1, keepdims=True, dtype=np.float64)
    share: Array = np.divide(table, total, out=np.zeros(table.shape), where=total > 0)
    return share


def chance_information(rows: Array, columns: Array, observations: float) -> float:
    """Expected plug-in mutual information of independent draws, bits.

    With cells Poisson around m = N p(e) p(f) it is sum (E[n ln n] - m ln m) / (N ln 2), which is
    E^2 / (2 N ln 2) for many observations. O(E^2).

    Args:
        rows, columns: [E] distributions of the two experts.
        observations: N.
    """
    mean = observations * np.outer(rows[rows > 0], columns[columns > 0])
    return float(_poisson_excess(mean).sum()) / (observations * float(np.log(2)))


def _information(table: Array, observations: Array, calm: Array) -> Information:
    """Args: table [L-1, E, E]; observations, calm [L-1]: how much less than Poisson cells vary."""
    raw = mutual_information(table)
    rows = _normalised(table.sum(axis=2))
    columns = _normalised(table.sum(axis=1))
    chance = np.full(len(table), np.nan)
    for layer in np.nonzero(observations > 0)[0]:
        chance[layer] = calm[layer] * chance_information(
            rows[layer], columns[layer], float(observations[layer])
        )
    smaller = np.minimum(entropy(rows), entropy(columns))
    corrected = raw - chance
    with np.errstate(divide="ignore", invalid="ignore"):
        nmi = np.where(smaller > 0, raw / smaller, np.nan)
        adjusted = np.where(smaller > chance, corrected / (smaller - chance), np.nan)
    return Information(raw, chance, corrected, nmi, adjusted)


def _normalised(counts: Array) -> Array:
    total = counts.sum(axis=-1, keepdims=True)
    share: Array = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    return share


def _mean_one_over_k(affinity: Affinity) -> Array:
    """[L] mean of 1/k over the tokens that use experts of the layer; nan without tokens."""
    used = affinity.k_histogram[:, 1:]
    with np.errstate(invalid="ignore"):
        mean: Array = (used / np.arange(1, used.shape[1] + 1)).sum(axis=1) / used.sum(axis=1)
    return mean


def _poisson_excess(mean: Array) -> Array:
    """E[n ln n] - m ln m for n Poisson around m."""
    grid, tabulated = _excess_table()
    with np.errstate(divide="ignore"):
        inside = np.interp(np.log(mean), grid, tabulated)
    excess: Array = np.where(mean > 100, 0.5 + 1 / (12 * np.maximum(mean, 1)), inside)
    return excess


@cache
def _excess_table() -> tuple[Array, Array]:
    """ln m, and E[n ln n] - m ln m, for m from 1e-12 to 100."""
    log_mean = np.linspace(np.log(1e-12), np.log(101), 2000)
    n = np.arange(1, 300)
    log_factorial = np.log(n).cumsum()
    mean = np.exp(log_mean)
    mass = np.exp(np.outer(log_mean, n) - mean[:, None] - log_factorial)
    return log_mean, mass @ (n * np.log(n)) - mean * log_mean

"""Spectral clustering of a weighted graph, small and deterministic for a generator.

Normalised Laplacian D^-1/2 A D^-1/2, its k leading eigenvectors as coordinates, rows scaled to
length 1, then k-means with k-means++ starts. Items without affinity to any other have no
coordinates and go to the smallest clusters. O(n^3). Source: Ng, Jordan and Weiss, On Spectral
Clustering, NIPS 2001.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_STARTS = 8
MAX_ROUNDS = 50
ROUNDING = 1e-9  # a shorter row is none: what is in it is the error of the eigenvectors

Matrix = NDArray[np.float64]


def spectral_clusters(
    affinity: Matrix, num_clusters: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[n] cluster of each item; clusters may be empty.

    Args:
        affinity: [n, n] symmetric, non-negative, 0 on the diagonal.
        num_clusters: k.
    """
    degree = affinity.sum(axis=1)
    lone = degree <= 0
    if lone.any():
        clusters = np.zeros(lone.size, np.int64)
        linked = np.ix_(~lone, ~lone)
        clusters[~lone] = spectral_clusters(affinity[linked], num_clusters, rng)
        size = np.bincount(clusters[~lone], minlength=num_clusters)
        for item in np.nonzero(lone)[0]:
            clusters[item] = size.argmin()
            size[clusters[item]] += 1
        return clusters
    num_items = len(affinity)
    if num_clusters == 1 or num_items <= num_clusters:
        return np.arange(num_items) % num_clusters
    scaled = affinity / np.sqrt(degree[:, None] * degree[None, :])
    _, vectors = np.linalg.eigh(scaled)
    points = vectors[:, -num_clusters:]
    length = np.linalg.norm(points, axis=1, keepdims=True)
    points = np.where(length > ROUNDING, points / np.maximum(length, ROUNDING), 0.0)
    best, best_cost = np.zeros(num_items, np.int64), np.inf
    for _ in range(NUM_STARTS):
        clusters, cost = _k_means(points, num_clusters, rng)
        if cost < best_cost * (1 - 1e-9):
            best, best_cost = clusters, cost
    return best


def _k_means(
    points: Matrix, num_clusters: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
    """Clusters [n] and the sum of squared distances to their centres."""
    centres = points[[int(rng.integers(len(points)))]]
    while len(centres) < num_clusters:
        nearest = _squared_distances(points, centres).min(axis=1)
        total = float(nearest.sum())
        chosen = int(np.searchsorted(nearest.cumsum(), rng.random() * total))
        centres = np.vstack([centres, points[min(chosen, len(points) - 1)]])
    clusters = np.full(len(points), -1)
    for _ in range(MAX_ROUNDS):
        closest = _squared_distances(points, centres).argmin(axis=1)
        if (closest == clusters).all():
            break
        clusters = closest
        for cluster in np.unique(clusters):
            centres[cluster] = points[clusters == cluster].mean(axis=0)
    distance = _squared_distances(points, centres)
    return clusters, float(distance[np.arange(len(points)), clusters].sum())


def _squared_distances(points: Matrix, centres: Matrix) -> Matrix:
    """[n, k]."""
    distance: Matrix = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
    return distance

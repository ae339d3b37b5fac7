"""Kernels of `solvers.published.flashlb`: one deployment by risk, and its score over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.compiling import compiled


def _deploy(
    mean: Any, covariance: Any, copies: Any, num_ranks: int, num_slots: int, z: float
) -> Any:
    table = np.full((num_ranks, num_slots), -1, np.int64)
    rank_mean, rank_variance = np.zeros(num_ranks), np.zeros(num_ranks)
    held = np.zeros(num_ranks, np.int64)
    for expert in np.argsort(-(mean / copies), kind="mergesort"):
        for _ in range(copies[expert]):
            best, best_risk, best_variance = -1, np.inf, 0.0
            for rank in range(num_ranks):
                if held[rank] == num_slots:
                    continue
                variance = rank_variance[rank] + covariance[expert, expert] / copies[expert] ** 2
                double = False
                for slot in range(held[rank]):
                    other = table[rank, slot]
                    double = double or other == expert
                    variance += 2 * covariance[expert, other] / (copies[expert] * copies[other])
                if double:
                    continue
                risk = rank_mean[rank] + mean[expert] / copies[expert]
                risk += z * np.sqrt(max(0.0, variance))
                if risk < best_risk:
                    best, best_risk, best_variance = rank, risk, variance
            if best < 0:  # every rank with room has the expert
                break
            table[best, held[best]] = expert
            held[best] += 1
            rank_mean[best] += mean[expert] / copies[expert]
            rank_variance[best] = best_variance
    return table


def _score(loads: Any, table: Any) -> Any:
    num_steps, num_experts = loads.shape
    num_ranks, num_slots = table.shape
    copies = np.zeros(num_experts)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if table[rank, slot] >= 0:
                copies[table[rank, slot]] += 1
    total_ratio = 0.0
    for step in range(num_steps):
        largest, total = 0.0, 0.0
        for rank in range(num_ranks):
            load = 0.0
            for slot in range(num_slots):
                if table[rank, slot] >= 0:
                    load += loads[step, table[rank, slot]] / copies[table[rank, slot]]
            largest = max(largest, load)
            total += load
        total_ratio += (largest * num_ranks + 1e-2) / (total + 1e-2)
    return total_ratio / num_steps


deploy = compiled(_deploy)
score = compiled(_score)

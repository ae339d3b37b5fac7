"""Kernel: counting token-expert pairs by scenario."""

from __future__ import annotations

from typing import Any

from solvers.compiling import compiled


@compiled
def count_pairs(experts: Any, scenario: Any, load: Any) -> None:
    """Add the pairs of experts [T, L, K] to load [C, L, E] by the scenario [T] of their token."""
    num_tokens, num_layers, width = experts.shape
    for token in range(num_tokens):
        for layer in range(num_layers):
            for column in range(width):
                expert = experts[token, layer, column]
                if expert >= 0:
                    load[scenario[token], layer, expert] += 1

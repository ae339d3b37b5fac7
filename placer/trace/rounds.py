"""Layers that route their tokens several times, each time through the same experts.

Chain-of-Experts (Wang et al., arXiv 2506.18945) sends a token through a layer's experts in several
rounds, each with a choice of its own. A trace holds a row per round, all with the number of their
layer; a plan holds a row per layer, because the experts exist once.

Shape letters: T tokens, L layers, L' rounds of all layers, N rounds of the layer that has most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.trace.model import Trace
from placer.trace.source import CHUNK_TOKENS, TraceSource


def round_names(layer_ids: Sequence[int]) -> list[str]:
    """[L'] a name for each round: "3" for the first of layer 3, "3_2" for the second, and so on."""
    seen: dict[int, int] = {}
    names = []
    for layer in layer_ids:
        seen[layer] = seen.get(layer, 0) + 1
        names.append(f"{layer}" if seen[layer] == 1 else f"{layer}_{seen[layer]}")
    return names


def one_row_per_layer(source: TraceSource) -> TraceSource:
    """The source with a row per layer; rounds of a token become tokens of their own.

    Load, co-activation and the messages of `alltoall` are sums over rounds, and stay exact: every
    round starts at the token's home and comes back. Flow from layer to layer joins rounds of the
    same number, where the token went through all rounds of a layer first: under `coherent` a plan
    is fitted to an approximation (and judged on the real order).
    """
    distinct = np.unique(source.layer_ids).size
    return source if distinct == source.num_layers else _FoldedSource(source)


class _FoldedSource(TraceSource):
    """Rounds as tokens: token t becomes tokens N t .. N t + N - 1, one for each round."""

    def __init__(self, parent: TraceSource) -> None:
        self._resemble(parent)
        self._parent = parent
        self.layer_ids, layer, rounds = np.unique(
            parent.layer_ids, return_inverse=True, return_counts=True
        )
        first = np.cumsum(rounds) - rounds
        self._layer = layer
        self._round = np.arange(layer.size) - first[layer]
        self._num_rounds = int(rounds.max())
        self.num_tokens = parent.num_tokens * self._num_rounds

    def chunks(
        self, max_tokens: int = CHUNK_TOKENS, *, with_weights: bool = True
    ) -> Iterator[Trace]:
        size = max(1, max_tokens // self._num_rounds)
        for chunk in self._parent.chunks(size, with_weights=with_weights):
            changed: dict[str, Any] = {
                name: self._repeat(name, values)
                for name in ("request", "position", "phase", "step", "home")
                if (values := getattr(chunk, name)) is not None
            }
            if chunk.weights is not None:
                changed["weights"] = self._fold(chunk.weights, 0)
            experts = self._fold(chunk.experts, -1)
            yield replace(chunk, experts=experts, layer_ids=self.layer_ids, **changed)

    def token_columns(self, names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
        for part in self._parent.token_columns(names):
            yield {name: self._repeat(name, part[name]) for name in names}

    def request_labels(self) -> dict[int, str]:
        return self._parent.request_labels()

    def _fold(self, values: NDArray[Any], fill: int) -> NDArray[Any]:
        """[T N, L, K] of [T, L', K]; rounds that a layer does not have use no expert."""
        num_tokens, _, top_k = values.shape
        shape = (num_tokens, self._num_rounds, self.layer_ids.size, top_k)
        folded = np.full(shape, fill, values.dtype)
        folded[:, self._round, self._layer] = values
        return folded.reshape(-1, self.layer_ids.size, top_k)

    def _repeat(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """[T N] a token's value for each round; rounds are forward passes of their own."""
        repeated = np.repeat(values, self._num_rounds)
        if name == "step":
            repeated = repeated * self._num_rounds
            repeated += np.tile(np.arange(self._num_rounds), values.size)
        return repeated

"""`Affinity`: what a trace says about load, co-activation and inter-layer affinity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Affinity:
    """Counts over the tokens of a trace, all additive: parts counted apart can be summed.

    Shape letters: L layers, E experts, K the most experts that a token uses in one layer.
    k_l is the number of experts that a token uses in layer l.

    Attributes:
        layer_ids: [L] int64, the real layer numbers, increasing.
        coactivation: [L, E, E] int64, tokens that chose both experts; symmetric, diagonal = load.
        affinity: [L-1, E, E] float64, flow from an expert to an expert of the next layer: a token
            adds 1 / (k_l * k_{l+1}) to each of its pairs, so 1 to the whole table.
        primary_affinity: [L-1, E, E] int64, tokens whose primary expert of layer l is the row and
            that use the column in layer l+1.
        primary_pairs: [L-1, E, E] int64, tokens whose primary experts of layers l and l+1 are the
            row and the column.
        k_histogram: [L, K+1] int64, tokens by the number of experts that they use in the layer.
    """

    layer_ids: NDArray[np.int64]
    coactivation: NDArray[np.int64]
    affinity: NDArray[np.float64]
    primary_affinity: NDArray[np.int64]
    primary_pairs: NDArray[np.int64]
    k_histogram: NDArray[np.int64]

    def __post_init__(self) -> None:
        num_layers = self.layer_ids.size
        num_experts = self.coactivation.shape[-1]
        between = (max(num_layers - 1, 0), num_experts, num_experts)
        for name, shape in {
            "coactivation": (num_layers, num_experts, num_experts),
            "affinity": between,
            "primary_affinity": between,
            "primary_pairs": between,
            "k_histogram": (num_layers, self.k_histogram.shape[-1]),
        }.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape}")

    @property
    def num_layers(self) -> int:
        return int(self.layer_ids.size)

    @property
    def num_experts(self) -> int:
        return int(self.coactivation.shape[-1])

    @property
    def top_k(self) -> int:
        """The most experts that a token could use in one layer (K)."""
        return int(self.k_histogram.shape[1]) - 1

    @property
    def load(self) -> NDArray[np.int64]:
        """[L, E] tokens that each expert received."""
        load: NDArray[np.int64] = np.einsum("lee->le", self.coactivation).copy()
        return load

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[L] tokens that used at least one expert of the layer."""
        tokens: NDArray[np.int64] = self.k_histogram[:, 1:].sum(axis=1)
        return tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the trace, whether they used experts or not."""
        return int(self.k_histogram[0].sum()) if self.num_layers else 0

    def __add__(self, other: Affinity) -> Affinity:
        """The counts of both parts together.

        Raises:
            ValueError: the parts have other layers or another number of experts.
        """
        if not isinstance(other, Affinity):
            return NotImplemented
        if self.num_experts != other.num_experts:
            raise ValueError(
                f"cannot add counts of {other.num_experts} experts to counts of {self.num_experts}"
            )
        if not np.array_equal(self.layer_ids, other.layer_ids):
            raise ValueError(
                f"cannot add counts of layers {other.layer_ids.tolist()} "
                f"to counts of layers {self.layer_ids.tolist()}"
            )
        wide, narrow = sorted((self.k_histogram, other.k_histogram), key=lambda h: -h.shape[1])
        histogram = wide.copy()
        histogram[:, : narrow.shape[1]] += narrow
        return Affinity(
            layer_ids=self.layer_ids,
            coactivation=self.coactivation + other.coactivation,
            affinity=self.affinity + other.affinity,
            primary_affinity=self.primary_affinity + other.primary_affinity,
            primary_pairs=self.primary_pairs + other.primary_pairs,
            k_histogram=histogram,
        )

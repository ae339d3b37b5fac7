"""The distinct sets of experts that the tokens of one layer use, and how many tokens use each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TokenSets:
    """N distinct (experts, home) of the tokens of one layer that use any expert.

    Attributes:
        num_experts: E.
        experts: [N, K] ids, in falling order, -1 = unused ones last.
        home: [N] where the tokens' hidden state is, -1 = that does not matter.
        weight: [N] tokens.
    """

    num_experts: int
    experts: NDArray[np.int64]
    home: NDArray[np.int64]
    weight: NDArray[np.float64]

    @staticmethod
    def of(
        tokens: NDArray[np.integer], num_experts: int, home: NDArray[np.integer] | None = None
    ) -> TokenSets:
        """Count the experts [T, K] of each token, -1 = unused, apart for each home [T] if given."""
        experts = np.sort(tokens.astype(np.int64), axis=1)[:, ::-1]
        homes = np.full(len(experts), -1) if home is None else home.astype(np.int64)
        rows = np.column_stack([homes, experts])[experts[:, 0] >= 0]
        distinct, count = np.unique(rows, axis=0, return_counts=True)
        return TokenSets(
            num_experts,
            np.ascontiguousarray(distinct[:, 1:]),
            np.ascontiguousarray(distinct[:, 0]),
            count.astype(np.float64),
        )

    def users(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[E + 1] where each expert's sets begin in the second array, of their numbers."""
        number, column = np.nonzero(self.experts >= 0)
        expert = self.experts[number, column]
        order = np.argsort(expert, kind="stable")
        count = np.bincount(expert, minlength=self.num_experts)
        return np.concatenate([[0], np.cumsum(count)]), number[order]

    def together(self) -> NDArray[np.float64]:
        """[E, E] tokens that use both; the diagonal counts those that use one."""
        pairs = np.zeros(self.num_experts**2)
        width = self.experts.shape[1]
        for a in range(width):
            for b in range(width):
                both = (self.experts[:, a] >= 0) & (self.experts[:, b] >= 0)
                key = self.experts[both, a] * self.num_experts + self.experts[both, b]
                pairs += np.bincount(key, self.weight[both], minlength=pairs.size)
        return pairs.reshape(self.num_experts, self.num_experts)

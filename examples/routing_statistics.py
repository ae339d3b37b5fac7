"""How much structure routing has: hot experts of a layer, and what one layer says about the next.

Arrays: ``experts`` [T, L, K] holds the expert ids of T tokens in L MoE layers, K per token; column
0 is the primary expert, the one with the highest gate weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing figures of one trace; mutual information in bits."""

    num_tokens: int
    max_over_mean_load: NDArray[np.float64]  # [L] busiest expert's load over the mean load
    min_over_mean_load: NDArray[np.float64]  # [L] the same of the idlest expert
    mutual_information: NDArray[np.float64]  # [L-1] between consecutive layers, all K x K pairs
    primary_mutual_information: NDArray[np.float64]  # [L-1] the same, primary experts only
    shuffled_mutual_information: float  # mean over layers with tokens shuffled: what chance gives

    def summary(self) -> str:
        """One line of means over layers."""
        return (
            f"load max/mean {self.max_over_mean_load.mean():.2f} "
            f"(layers {self.max_over_mean_load.min():.2f} to {self.max_over_mean_load.max():.2f}), "
            f"min/mean {self.min_over_mean_load.min():.3f}, "
            f"MI {self.mutual_information.mean():.3f} bits "
            f"(primary {self.primary_mutual_information.mean():.3f}, "
            f"shuffled {self.shuffled_mutual_information:.3f}), {self.num_tokens} tokens"
        )


def mutual_information(
    first: NDArray[np.integer], second: NDArray[np.integer], num_experts: int
) -> float:
    """Mutual information in bits between two layers' experts [T, K], each pair weighing 1 / K^2."""
    k_first, k_second = first.shape[1], second.shape[1]
    pairs = first[:, :, None].astype(np.int64) * num_experts + second[:, None, :]
    joint = np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
    joint = joint / (len(first) * k_first * k_second)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def routing_statistics(experts: NDArray[np.integer], num_experts: int) -> RoutingStatistics:
    """The figures of a trace [T, L, K] in which every token used K experts."""
    num_tokens, num_layers, _ = experts.shape
    load = np.stack(
        [np.bincount(experts[:, i].ravel(), minlength=num_experts) for i in range(num_layers)]
    )
    relative = load / load.mean(1, keepdims=True)
    shuffled = np.random.default_rng(0).permutation(num_tokens)

    def consecutive(k: int, order: NDArray[np.integer] | slice) -> NDArray[np.float64]:
        return np.array(
            [
                mutual_information(experts[:, i, :k], experts[order, i + 1, :k], num_experts)
                for i in range(num_layers - 1)
            ]
        )

    k = experts.shape[2]
    return RoutingStatistics(
        num_tokens=num_tokens,
        max_over_mean_load=relative.max(1),
        min_over_mean_load=relative.min(1),
        mutual_information=consecutive(k, slice(None)),
        primary_mutual_information=consecutive(1, slice(None)),
        shuffled_mutual_information=float(consecutive(k, shuffled).mean()),
    )

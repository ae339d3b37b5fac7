"""Which slot serves each token-expert pair of this rank's tokens.

The policy `local` of docs/metrics.md: a rank decides by what it knows without asking, its own
tokens of the pass and the plan, and so does the replay in `placer.cost`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from placer.cost.serving import serve_layer
from placer.placement import Placement


class Serving:
    """Chooses slots as the replay in `placer.cost` does.

    Args:
        placement: where the experts are.
        rank: the home of the tokens that are served.
        device: of the tensors.
    """

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        self._placement = placement
        self._rank = rank
        self._ranks = placement.ranks_of_experts()
        self._copies = (self._ranks >= 0).sum(axis=2).astype(np.int32)
        self._has_replicas = self._ranks.shape[2] > 1
        table = placement.physical_to_logical
        # [L, E, G] slot of each expert on each rank, -1 = none
        self._slots = np.full(
            (placement.num_layers, placement.num_experts, placement.num_ranks), -1, np.int32
        )
        layer, slot = np.nonzero(table >= 0)
        self._slots[layer, table[layer, slot], slot // placement.slots_per_rank] = slot
        only = torch.from_numpy(self._slots.max(axis=2))
        # one more column, for experts that a token does not use
        unused = torch.full((placement.num_layers, 1), -1, dtype=torch.int32)
        self._only = torch.cat((only, unused), dim=1).to(device)

    def slots(self, layer: int, experts: Tensor, weights: Tensor) -> Tensor:
        """[T, K] int32 slot of each pair, -1 = unused.

        Args:
            layer: index of the MoE layer.
            experts: [T, K] logical ids; those outside 0..E-1 are unused.
            weights: [T, K] gate weights.
        """
        num_experts = self._placement.num_experts
        used = (experts >= 0) & (experts < num_experts)
        if not self._has_replicas or not len(experts):
            return self._only[layer][torch.where(used, experts, num_experts)]
        ids = torch.where(used, experts, -1).to("cpu", torch.int32).numpy()
        placement = self._placement
        served = serve_layer(
            ids,
            self._ranks[layer],
            self._copies[layer],
            self._rank,
            placement.num_ranks,
            placement.ranks_per_node,
        )
        chosen = np.where(ids < 0, -1, self._slots[layer, ids, served])
        return torch.from_numpy(chosen).to(experts.device)

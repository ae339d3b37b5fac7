"""The experts that a rank holds in one layer, and what they make of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from placer.placement import Placement
from placer.runtime.counters import Counters
from placer.runtime.loading import local_slots
from placer.runtime.rows import Tokens


class Bank:
    """Runs the model's own experts module on the pairs that this rank serves.

    Args:
        module: the experts' module with only this rank's experts, in the order of slots.
        placement: where the experts are.
        layer: index of the MoE layer.
        rank: this rank.
        device: of the tensors.
    """

    def __init__(
        self, module: Any, placement: Placement, layer: int, rank: int, device: torch.device
    ) -> None:
        self.module = module
        self._layer = layer
        held = local_slots(placement, layer, rank)
        num_slots = placement.physical_to_logical.shape[1]
        local = np.full(num_slots + 1, -1, np.int64)  # the last one stands for slot -1
        for i, (slot, _) in enumerate(held):
            local[slot] = i
        self._local = torch.from_numpy(local).to(device)

    def partial_sums(self, tokens: Tokens, counters: Counters) -> Tensor:
        """[n, D] sum over the token's experts that are here of weight x output; 0 without any."""
        local = self._local[tokens.slots.long()]
        token, column = torch.nonzero(local >= 0, as_tuple=True)
        sums = torch.zeros_like(tokens.hidden)
        counters.pairs[self._layer] += len(token)
        if len(token):
            outputs = self.module(
                tokens.hidden[token],
                local[token, column][:, None],
                tokens.weights[token, column][:, None],
            )
            sums.index_add_(0, token, outputs.to(sums.dtype))
        return sums

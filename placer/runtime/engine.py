"""`Engine`: a stock model on one rank, its experts replaced by the group's.

The model keeps its own router, shared experts and attention. Where its experts module stood there
is an `ExpertsSlot`, which hands hidden states and the router's choice to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from placer.placement import Placement
from placer.plan import Dispatch
from placer.runtime.bank import Bank
from placer.runtime.counters import Counters
from placer.runtime.dispatch.allgather import allgather
from placer.runtime.dispatch.alltoall import alltoall, alltoall_by_node
from placer.runtime.dispatch.common import Group
from placer.runtime.layout import ModelLayout
from placer.runtime.probe import Experts, probe
from placer.runtime.recording import Recorder
from placer.runtime.rows import Tokens
from placer.runtime.serving import Serving
from placer.runtime.transport import Transport
from placer.tracer.structure import parent_of


@dataclass(frozen=True, eq=False)
class PassTokens:
    """The tokens of this rank in one forward pass of the stock model.

    Attributes:
        index: [T] which rows of the flattened [B * S] hidden states are real tokens.
        request, position: [T] who they are.
        step: number of the pass.
    """

    index: Tensor
    request: NDArray[np.int64]
    position: NDArray[np.int64]
    step: int


class ExpertsSlot(nn.Module):
    """Stands where the experts of one layer stood.

    Args:
        layer: index of the MoE layer.
        run: what is called with (layer, hidden states, expert ids, weights).
    """

    def __init__(self, layer: int, run: Experts) -> None:
        super().__init__()
        self._layer = layer
        self._run = run

    def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._run(self._layer, hidden_states, ids, weights)


class Engine:
    """One rank's model in an expert-parallel group.

    Args:
        layout: of the model.
        model: with this rank's experts only; from `load_share`. It is changed.
        placement: where the experts are.
        transport: moves bytes.
        recorder: keeps which experts tokens took; None not to.

    Attributes:
        model: the model.
        layout: as given.
        group: what dispatch models work with.
        counters: what was sent, and how long it took.
        probe: what a first pass told about the model.
        recorder: as given.
    """

    def __init__(
        self,
        layout: ModelLayout,
        model: Any,
        placement: Placement,
        transport: Transport,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self.layout, self.model = layout, model
        self.recorder = recorder
        device = transport.device
        self.counters = Counters(placement.num_layers, device.type)
        banks = [
            Bank(model.get_submodule(layer.experts), placement, i, transport.rank, device)
            for i, layer in enumerate(layout.layers)
        ]
        self.group = Group(placement, transport, self.counters, banks)
        self.serving = Serving(placement, transport.rank, device)
        self._run_experts: Experts = self._fixed
        self._tokens: PassTokens | None = None
        self._dispatch: Callable[[Group, int, Tokens], Tensor] = alltoall
        for i, layer in enumerate(layout.layers):
            parent = model.get_submodule(parent_of(layer.experts))
            name = layer.experts.rpartition(".")[2]
            setattr(parent, name, ExpertsSlot(i, lambda *given: self._run_experts(*given)))
        self.probe = probe(model, layout, self.swap_experts, device)

    @property
    def device(self) -> torch.device:
        return self.group.transport.device

    def choose(self, dispatch: Dispatch, deduplicate_nodes: bool) -> None:
        """Take a dispatch model for passes in which tokens stay at home.

        Args:
            dispatch: the model; `coherent` stays at home only to prefill, as `alltoall`.
            deduplicate_nodes: under `alltoall`, one copy of a token per other node.
        """
        if dispatch == "allgather":
            self._dispatch = allgather
        else:
            self._dispatch = alltoall_by_node if deduplicate_nodes else alltoall

    def swap_experts(self, run: Experts) -> Experts:
        """Have the experts' slots call something else; returns what they called before."""
        before, self._run_experts = self._run_experts, run
        return before

    def begin(self, tokens: PassTokens | None, tokens_of_rank: Sequence[int]) -> None:
        """Say which tokens the next pass of the stock model holds; None for no pass here."""
        self._tokens = tokens
        self.group.tokens_of_rank = tokens_of_rank

    def pass_without_tokens(self) -> None:
        """Take part in every layer's exchanges with no token of one's own."""
        top_k = self.probe.top_k
        nothing = Tokens(
            torch.empty((0, self.layout.hidden_size), dtype=self.layout.dtype, device=self.device),
            torch.empty((0, top_k), dtype=torch.int32, device=self.device),
            torch.empty((0, top_k), device=self.device),
        )
        for i in range(len(self.layout.layers)):
            self._dispatch(self.group, i, nothing)

    def routed(
        self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, tokens: PassTokens
    ) -> Tokens:
        """Tokens with the slots that serve them; keeps their routing if a recorder is there."""
        if self.recorder is not None:
            self.recorder.add(tokens.step, layer, tokens.request, tokens.position, ids, weights)
        slots = self.serving.slots(layer, ids, weights)
        gates = torch.where(slots >= 0, weights.float(), 0)
        return Tokens(hidden, slots, gates)

    def _fixed(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Experts of tokens that stay at home."""
        tokens = self._tokens
        assert tokens is not None, "the model runs without begin()"
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.routed(
            layer,
            flat.index_select(0, tokens.index),
            ids.reshape(len(flat), -1).index_select(0, tokens.index),
            weights.reshape(len(flat), -1).index_select(0, tokens.index),
            tokens,
        )
        sums = self._dispatch(self.group, layer, chosen)
        out = torch.zeros_like(flat)
        out[tokens.index] = sums
        return out.view_as(hidden)

"""`Trace`: which experts each token took, per MoE layer, in a real run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

PREFILL = 0
DECODE = 1
PHASE_NAMES = ("prefill", "decode")


@dataclass(frozen=True)
class ModelDims:
    """What the cost model needs to know of the traced model; None where it is not known.

    Attributes:
        name: name or path of the model.
        hidden_size: width of a token's hidden state, in elements.
        expert_bytes: bytes of the weights of one expert of one layer.
        expert_flops_per_token: floating-point operations of one token in one expert.
    """

    name: str | None = None
    hidden_size: int | None = None
    expert_bytes: int | None = None
    expert_flops_per_token: float | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of T tokens through L MoE layers, at most K experts each.

    Attributes:
        experts: [T, L, K] int16 or int32, logical expert ids; -1 = unused. Used ids come first,
            each at most once. Where `weights` is None, column 0 is the primary expert.
        num_experts: E, logical experts per layer.
        layer_ids: [L] int64, the real layer numbers, increasing. Where a layer routes its tokens
            several times (Chain-of-Experts), its number stands once for each round.
        request: [T] int64, the request that a token belongs to.
        position: [T] int64, the token's position in its request.
        phase: [T] uint8, 0 prefill, 1 decode.
        step: [T] int64, number of the forward pass, or None when it was not recorded.
        weights: [T, L, K] float32 gate weights (0 where unused), or None.
        home: [T] int64, the rank where the token entered, or None (then request mod num_ranks).
        labels: request id -> domain or workload; empty when there are none.
        model: dimensions of the model.

    Build one with `placer.trace.make_trace`, which checks all of this.
    """

    experts: NDArray[np.integer]
    num_experts: int
    layer_ids: NDArray[np.int64]
    request: NDArray[np.int64]
    position: NDArray[np.int64]
    phase: NDArray[np.uint8]
    step: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    home: NDArray[np.int64] | None = None
    labels: dict[int, str] = field(default_factory=dict)
    model: ModelDims = field(default_factory=ModelDims)

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """The most experts that a token may use in one layer (K)."""
        return int(self.experts.shape[2])

    def requests(self) -> NDArray[np.int64]:
        """The distinct request ids, increasing."""
        return np.unique(self.request)

    def primary(self) -> NDArray[np.integer]:
        """[T, L] primary expert: highest weight (ties: the first column), else column 0.

        -1 where a token used no expert of a layer.
        """
        if self.weights is None:
            return self.experts[:, :, 0]
        masked = np.where(self.experts >= 0, self.weights, -np.inf)
        column = masked.argmax(axis=2)
        return np.take_along_axis(self.experts, column[:, :, None], axis=2)[:, :, 0]

    def select(self, mask: NDArray[np.bool_]) -> Trace:
        """The tokens where `mask` [T] is true, in their order."""
        return replace(
            self,
            experts=self.experts[mask],
            request=self.request[mask],
            position=self.position[mask],
            phase=self.phase[mask],
            step=None if self.step is None else self.step[mask],
            weights=None if self.weights is None else self.weights[mask],
            home=None if self.home is None else self.home[mask],
        )

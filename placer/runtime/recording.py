"""Which experts the tokens of a run took, kept so that the run can be replayed as a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from placer.trace import Trace, make_trace
from placer.trace.model import ModelDims


@dataclass(frozen=True, eq=False)
class Fragment:
    """Routing of some tokens in one layer and forward pass.

    Attributes:
        step: number of the forward pass.
        layer: index of the MoE layer.
        request, position: [n] who they are.
        experts: [n, K].
        weights: [n, K] float32.
    """

    step: int
    layer: int
    request: NDArray[np.int64]
    position: NDArray[np.int64]
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(eq=False)
class Recorder:
    """Keeps fragments on one rank.

    Attributes:
        fragments: what was kept.
        is_on: false to keep nothing for a while, where time is measured.
    """

    fragments: list[Fragment] = field(default_factory=list)
    is_on: bool = True

    def add(
        self,
        step: int,
        layer: int,
        request: NDArray[np.int64],
        position: NDArray[np.int64],
        experts: Tensor,
        weights: Tensor,
    ) -> None:
        """Keep the routing of n tokens."""
        if not self.is_on:
            return
        ids = experts.detach().to("cpu").numpy().astype(np.int64)
        values = weights.detach().to("cpu").float().numpy()
        self.fragments.append(Fragment(step, layer, request, position, ids, values))


def merge(
    fragments: Iterable[Fragment],
    *,
    num_experts: int,
    layer_ids: Sequence[int],
    homes: Sequence[int],
    prompt_lengths: Sequence[int],
    model: ModelDims,
) -> Trace:
    """The fragments of all ranks as one trace: tokens by pass, then request, then position.

    Args:
        fragments: every (token, layer) once.
        num_experts: E.
        layer_ids: [L] the model's numbers of the MoE layers.
        homes: [requests] rank where each request's tokens enter.
        prompt_lengths: [requests] tokens before the first generated one.
        model: dimensions.
    """
    held = list(fragments)
    layer, step = (
        np.concatenate([np.full(len(f.request), getattr(f, name)) for f in held])
        for name in ("layer", "step")
    )
    request = np.concatenate([f.request for f in held])
    position = np.concatenate([f.position for f in held])
    order = np.lexsort((layer, position, request, step))
    first = order.reshape(-1, len(layer_ids))[:, 0]  # the same token's layers follow each other
    experts = np.concatenate([f.experts for f in held])[order]
    weights = np.concatenate([f.weights for f in held])[order]
    used = (experts >= 0) & (experts < num_experts)
    shape = (len(first), len(layer_ids), experts.shape[1])
    requests, positions = request[first], position[first]
    return make_trace(
        experts=np.where(used, experts, -1).reshape(shape),
        num_experts=num_experts,
        layer_ids=np.array(layer_ids, np.int64),
        request=requests,
        position=positions,
        phase=(positions >= np.array(prompt_lengths)[requests]).astype(np.uint8),
        step=step[first],
        weights=np.where(used, weights, 0).reshape(shape),
        home=np.array(homes, np.int64)[requests],
        model=model,
    )

"""`ModelShape`: the dimensions of a model that traffic, compute and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass

from placer.trace.model import ModelDims


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Dimensions of a Mixture-of-Experts model; None where they are not known.

    Attributes:
        name: of the preset, or path of the checkpoint.
        num_layers: decoder layers, dense ones included.
        num_moe_layers: L, layers with experts.
        num_experts: E, of one layer.
        top_k: K, experts that a token uses in a layer.
        num_expert_groups: groups of consecutive experts that the router limits a token to some of;
            1 = it has none.
        hidden_size: elements of a hidden state.
        expert_params: weights of one expert of one layer, biases included.
        expert_bytes: bytes of these as they are stored.
        expert_flops_per_token: two for each weight of the expert's matrices.
        other_params: weights of everything else: attention, embeddings, routers, shared experts,
            dense layers.
        other_bytes: bytes of these as they are stored.
        kv_bytes_per_token: keys and values of one token over all layers, 2 bytes an element.
        source: where the figures come from.
    """

    name: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_params: int
    expert_bytes: int | None
    expert_flops_per_token: float | None
    other_params: int
    other_bytes: int | None
    kv_bytes_per_token: int | None
    num_expert_groups: int = 1
    source: str = ""

    @property
    def total_params(self) -> int:
        return self.other_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def dims(self) -> ModelDims:
        """What the cost model needs of it."""
        return ModelDims(
            self.name, self.hidden_size, self.expert_bytes, self.expert_flops_per_token
        )

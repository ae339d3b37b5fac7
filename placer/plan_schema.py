"""What a plan file may hold, checked by pydantic where it enters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

Count = Annotated[StrictInt, Field(ge=1)]


class ModelDocument(BaseModel):
    """Dimensions of the model; null where not known."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    hidden_size: Count | None = None
    expert_bytes: Count | None = None
    expert_flops_per_token: float | None = None


class PlanDocument(BaseModel):
    """A plan file of schema version 1."""

    model_config = ConfigDict(extra="ignore")

    model: ModelDocument = Field(default_factory=ModelDocument)
    layer_ids: Annotated[list[StrictInt], Field(min_length=1)]
    num_experts: Count
    num_ranks: Count
    ranks_per_node: Count
    slots_per_rank: Count
    physical_to_logical: list[list[StrictInt]]
    dispatch: Literal["alltoall", "coherent", "allgather"] = "alltoall"
    prediction: dict[str, Any] = Field(default_factory=dict)
    certificate: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    timings: dict[str, Any] = Field(default_factory=dict)

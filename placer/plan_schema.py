"""What a plan file may hold, checked by pydantic where it enters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, StrictInt

MOST = 2**31 - 1
Count = Annotated[StrictInt, Field(ge=1, le=MOST)]


class ModelDocument(BaseModel):
    """Dimensions of the model; null where not known."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    hidden_size: Annotated[StrictInt, Field(ge=1)] | None = None
    expert_bytes: Annotated[StrictInt, Field(ge=1)] | None = None
    expert_flops_per_token: Annotated[FiniteFloat, Field(gt=0)] | None = None


class Figure(BaseModel):
    """A figure with its interval."""

    value: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None


class Change(BaseModel):
    """A figure against a baseline's."""

    change: FiniteFloat | None
    change_low: FiniteFloat | None
    change_high: FiniteFloat | None


class PredictionDocument(BaseModel):
    """What `placer evaluate` prints, as far as placer reads it back."""

    format: Literal["placer.evaluation"]
    scope: Literal["held-out", "unseen", "in-sample"]
    requests: StrictInt
    tokens: StrictInt
    dispatch: str
    metrics: dict[str, Figure]
    baselines: dict[str, dict[str, Figure]]
    change: dict[str, dict[str, Change]]


class BoundDocument(BaseModel):
    """A proven bound beside the plan's value, on the tokens that it was fitted to."""

    figure: str
    value: FiniteFloat
    lower_bound: FiniteFloat
    gap: FiniteFloat
    method: str
    max_imbalance: FiniteFloat | None = None


class CertificateDocument(BaseModel):
    """How good the placement is on the tokens that it was fitted to."""

    objective: str
    value: FiniteFloat | None
    lower_bound: FiniteFloat | None
    gap: FiniteFloat | None
    status: str
    bound_of: str | None = None
    max_imbalance: FiniteFloat | None = None
    bounds: list[BoundDocument] = Field(default_factory=list)


class InputDocument(BaseModel):
    """A trace that the plan was fitted to."""

    fingerprint: str


class SplitDocument(BaseModel):
    """How the requests were divided."""

    seed: Annotated[StrictInt, Field(ge=0)]
    holdout: Annotated[float, Field(gt=0, lt=1)]
    in_sample: bool


class ProvenanceDocument(BaseModel):
    """Where the plan came from, as far as placer reads it back."""

    inputs: list[InputDocument] = Field(default_factory=list)
    split: SplitDocument | None = None
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    settings: dict[str, Any] = Field(default_factory=dict)


def _as(schema: type[BaseModel]) -> AfterValidator:
    """Check a JSON object against `schema` and keep it as it is; an empty one says nothing."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        if value:
            schema.model_validate(value)
        return value

    return AfterValidator(check)


class PlanDocument(BaseModel):
    """A plan file of schema version 1."""

    model_config = ConfigDict(extra="ignore")

    model: ModelDocument = Field(default_factory=ModelDocument)
    layer_ids: Annotated[list[Annotated[StrictInt, Field(ge=0, le=MOST)]], Field(min_length=1)]
    num_experts: Count
    num_ranks: Count
    ranks_per_node: Count
    slots_per_rank: Count
    physical_to_logical: list[list[Annotated[StrictInt, Field(ge=-1, le=MOST)]]]
    dispatch: Literal["alltoall", "coherent", "allgather"] = "alltoall"
    prediction: Annotated[dict[str, Any], _as(PredictionDocument)] = Field(default_factory=dict)
    certificate: Annotated[dict[str, Any], _as(CertificateDocument)] = Field(default_factory=dict)
    provenance: Annotated[dict[str, Any], _as(ProvenanceDocument)] = Field(default_factory=dict)
    timings: dict[str, FiniteFloat] = Field(default_factory=dict)

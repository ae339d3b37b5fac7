"""What a model takes of every rank's memory: experts, everything else, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from placer.cluster import Cluster, fits
from placer.errors import InfeasibleError, UsageError
from placer.models.shape import ModelShape
from placer.wording import sized

DEFAULT_RESERVE = 0.1


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank; modelled.

    Attributes:
        experts_bytes: L x slots x expert_bytes.
        replicas_bytes: the part of it that is beyond one copy of every expert, mean over ranks.
        other_bytes: all other weights, which every rank holds (data-parallel attention).
        kv_bytes: keys and values of `kv_tokens`.
        reserved_bytes: for the runtime, communication buffers and activations.
        memory_bytes: what the smallest rank has; None = unknown.
    """

    experts_bytes: int
    replicas_bytes: int
    other_bytes: int
    kv_bytes: int
    reserved_bytes: int
    memory_bytes: int | None

    @property
    def used_bytes(self) -> int:
        return self.experts_bytes + self.other_bytes + self.kv_bytes + self.reserved_bytes

    @property
    def free_bytes(self) -> int | None:
        """What is left; negative where it does not fit; None where the memory is unknown."""
        return None if self.memory_bytes is None else self.memory_bytes - self.used_bytes

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "modelled": True,
            "experts_bytes": self.experts_bytes,
            "replicas_bytes": self.replicas_bytes,
            "other_bytes": self.other_bytes,
            "kv_bytes": self.kv_bytes,
            "reserved_bytes": self.reserved_bytes,
            "used_bytes": self.used_bytes,
            "memory_bytes": self.memory_bytes,
            "free_bytes": self.free_bytes,
        }


def memory_of(
    shape: ModelShape,
    cluster: Cluster,
    slots_per_rank: int,
    *,
    kv_tokens: int = 0,
    reserve: float = DEFAULT_RESERVE,
) -> RankMemory:
    """What a rank of the cluster holds.

    Args:
        shape: of the model.
        cluster: with the number of ranks of the plan.
        slots_per_rank: of one layer.
        kv_tokens: tokens whose keys and values a rank keeps at once.
        reserve: share of a rank's memory that weights and KV cannot have. Engines keep as much
            (vLLM's `gpu_memory_utilization` is 0.9 by default): estimates that leave out what the
            framework takes are what makes plans fail with out-of-memory (Pipette).

    Raises:
        UsageError: a figure is unknown that is needed, or an argument makes no sense.
    """
    if kv_tokens < 0 or not 0 <= reserve < 1:
        raise UsageError(
            f"kv_tokens is {kv_tokens}, reserve {reserve:g}; expected 0 or more, 0 to 1"
        )
    for name, value, needed in (
        ("expert_bytes", shape.expert_bytes, True),
        ("other_bytes", shape.other_bytes, True),
        ("kv_bytes_per_token", shape.kv_bytes_per_token, kv_tokens > 0),
    ):
        if needed and value is None:
            raise UsageError(
                f"the {name} of {shape.name} is not known, its memory cannot be modelled",
                "its quantisation or attention is of a kind that placer does not know",
            )
    memory = cluster.of_ranks("memory_bytes")
    least = None if memory is None else int(memory.min())
    expert_bytes = shape.expert_bytes or 0
    slots = cluster.num_ranks * slots_per_rank - shape.num_experts
    spare = max(0, slots) * shape.num_moe_layers * expert_bytes
    return RankMemory(
        experts_bytes=shape.num_moe_layers * slots_per_rank * expert_bytes,
        replicas_bytes=spare // cluster.num_ranks,
        other_bytes=shape.other_bytes or 0,
        kv_bytes=kv_tokens * (shape.kv_bytes_per_token or 0),
        reserved_bytes=0 if least is None else int(least * reserve),
        memory_bytes=least,
    )


def check_memory(
    shape: ModelShape,
    cluster: Cluster,
    slots_per_rank: int,
    *,
    kv_tokens: int = 0,
    reserve: float = DEFAULT_RESERVE,
) -> RankMemory:
    """`memory_of`, refused where it does not fit.

    Raises:
        InfeasibleError: it does not fit; says by how much, and what would.
    """
    found = memory_of(shape, cluster, slots_per_rank, kv_tokens=kv_tokens, reserve=reserve)
    if found.free_bytes is None or found.free_bytes >= 0:
        return found
    other = found.other_bytes + found.reserved_bytes
    if shape.expert_bytes and found.memory_bytes and other > found.memory_bytes:
        raise InfeasibleError(
            f"all weights but the experts of {shape.name} take "
            f"{sized(found.other_bytes)} on every rank; a rank of {cluster.name} has "
            f"{sized(found.memory_bytes - found.reserved_bytes)} for them: "
            f"{sized(other - found.memory_bytes)} too much",
            "placer models data-parallel attention, which every rank holds whole",
        )
    parts = [f"{sized(found.other_bytes)} of other weights"]
    if kv_tokens:
        parts.append(f"{sized(found.kv_bytes)} of KV ({kv_tokens:,} tokens)")
    parts.append(f"{sized(found.reserved_bytes)} reserved")
    fits(
        cluster,
        num_layers=shape.num_moe_layers,
        slots_per_rank=slots_per_rank,
        expert_bytes=shape.expert_bytes or 0,
        other_bytes=other + found.kv_bytes,
        other="the rest (" + ", ".join(parts) + ")",
    )
    return found

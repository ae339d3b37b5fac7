"""What fits into the memory of every rank."""

from __future__ import annotations

from placer.cluster.model import Cluster
from placer.errors import InfeasibleError
from placer.wording import sized


def fits(
    cluster: Cluster,
    *,
    num_layers: int,
    slots_per_rank: int,
    expert_bytes: int,
    other_bytes: int = 0,
    other: str = "other data",
) -> int | None:
    """Bytes that stay free on the fullest rank, or None where the cluster's memory is unknown.

    A rank holds num_layers * slots_per_rank * expert_bytes of experts, and `other_bytes` of
    everything else (attention, KV cache, activations).

    Args:
        cluster: with the ranks' memory.
        num_layers: MoE layers.
        slots_per_rank: of one layer.
        expert_bytes: of one expert of one layer.
        other_bytes: of everything else on a rank.
        other: what that is, in words.

    Raises:
        InfeasibleError: they do not fit; the message says by how much.
    """
    memory = cluster.of_ranks("memory_bytes")
    if memory is None:
        return None
    rank = int(memory.argmin())
    least = int(memory[rank])
    slot_bytes = num_layers * expert_bytes
    experts_bytes = slots_per_rank * slot_bytes
    free = least - experts_bytes - other_bytes
    if free >= 0:
        return free
    most = max(0, (least - other_bytes) // slot_bytes)
    rest = f" beside {sized(other_bytes)} of {other}" if other_bytes else ""
    is_common = least == cluster.memory_bytes
    which = f"a rank of {cluster.name}" if is_common else f"rank {rank} of {cluster.name}"
    raise InfeasibleError(
        f"the experts of a rank take {sized(experts_bytes)} ({num_layers} layers x "
        f"{slots_per_rank} slots x {sized(expert_bytes)}){rest}; {which} "
        f"has {sized(least)}: {sized(-free)} too much",
        f"at most {most} slots per rank fit; use more ranks or fewer slots per rank"
        if most
        else f"no slot fits beside {other}: keep less of it, or use ranks with more memory",
    )

"""Whether a plan and a model belong together, and a machine can hold what they ask of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from placer.errors import InfeasibleError, UsageError
from placer.placement import Placement
from placer.plan import Plan
from placer.runtime.layout import ModelLayout
from placer.runtime.loading import share_bytes
from placer.runtime.memory import available_bytes

_HINT = "solve a plan from a trace of this model"


def check_plan(plan: Plan, layout: ModelLayout, what: str) -> None:
    """Raise UsageError when a plan was made for another model.

    Args:
        plan: the plan.
        layout: of the model.
        what: the plan's name, for messages.
    """
    found = [layer.layer_id for layer in layout.layers]
    placement = plan.placement
    if placement.num_experts != layout.num_experts:
        raise UsageError(
            f"{what} places {placement.num_experts} experts per layer, the model has "
            f"{layout.num_experts}", _HINT,
        )  # fmt: skip
    if list(plan.layer_ids) != found:
        raise UsageError(
            f"{what} is for MoE layers {_short(plan.layer_ids)}, the model has {_short(found)}",
            _HINT,
        )
    hidden_size = plan.model.hidden_size
    if hidden_size is not None and hidden_size != layout.hidden_size:
        raise UsageError(
            f"{what} is for a model of hidden size {hidden_size}, this one has "
            f"{layout.hidden_size}", _HINT,
        )  # fmt: skip


def check_num_ranks(placement: Placement, num_ranks: int) -> None:
    """Raise UsageError when there are not as many processes as the plan has ranks."""
    if placement.num_ranks != num_ranks:
        raise UsageError(
            f"the plan is for {placement.num_ranks} ranks, {num_ranks} were started",
            f"start {placement.num_ranks}, or solve for {num_ranks} with --gpus {num_ranks}",
        )


def check_memory(
    layout: ModelLayout,
    placement: Placement,
    ranks: Sequence[int],
    device: torch.device,
    *,
    holds_others: bool = False,
) -> None:
    """Raise InfeasibleError when the weights of some ranks do not fit where they go.

    Args:
        layout: of the model.
        placement: where the experts are.
        ranks: on a CPU, all ranks of this host, which share its memory; else the one rank.
        device: where weights go.
        holds_others: what is not an expert is there already.
    """
    needed = sum(share_bytes(layout, placement, rank) for rank in ranks)
    if holds_others:
        needed -= len(ranks) * layout.other_bytes
    if device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(device)[0]
        where = str(device)
    else:
        free, where = available_bytes(), "this machine"
    if free is not None and needed > free:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
        raise InfeasibleError(
            f"the weights of {who} take {needed / 1e9:.2f} GB, {where} has {free / 1e9:.2f} GB",
            "use more ranks on more machines, fewer slots per rank, or a smaller --dtype",
        )


def _short(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return f"{shown}, ... ({len(numbers)} layers)" if len(numbers) > 4 else shown

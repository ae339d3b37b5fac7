"""Proof that every slot holds the expert that the plan says.

Every rank takes a checksum of the weights in each of its slots as they are in memory. Beside that,
every expert of the model is read from the checkpoint once more, by some rank that is chosen by its
number and not by the plan, and its checksum is taken. All ranks then compare the two tables.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from placer.errors import PlacerError
from placer.placement import Placement
from placer.runtime.counters import Counters
from placer.runtime.gather import all_gather
from placer.runtime.layout import ModelLayout
from placer.runtime.loading import local_slots
from placer.runtime.mapping import Mapping
from placer.runtime.transport import Transport


class WrongExpertError(PlacerError):
    """A slot holds other weights than those of the expert that the plan puts there."""


def verify(
    layout: ModelLayout,
    mapping: Mapping,
    placement: Placement,
    stacks: list[Any],
    transport: Transport,
) -> int:
    """Check all slots of all ranks; every rank calls this.

    Args:
        layout: of the model.
        mapping: reads the checkpoint.
        placement: where the experts are.
        stacks: [L] this rank's experts modules.
        transport: moves checksums.

    Returns:
        Filled slots that were checked, of all ranks together.

    Raises:
        WrongExpertError: names the first slot that is wrong, on every rank alike.
    """
    num_layers, num_slots = placement.physical_to_logical.shape
    held = np.full((num_layers, num_slots), -1, np.int64)
    for layer, stack in enumerate(stacks):
        for i, (slot, _) in enumerate(local_slots(placement, layer, transport.rank)):
            weights = [getattr(stack, name)[i] for name in layout.expert_parameters]
            held[layer, slot] = checksum(weights)
    read = np.full((num_layers, layout.num_experts), -1, np.int64)
    for number in range(transport.rank, read.size, transport.num_ranks):
        layer, expert = divmod(number, layout.num_experts)
        read[layer, expert] = checksum(_read(layout, mapping, layer, expert))
    held, read = _merged(held, transport), _merged(read, transport)
    filled = placement.physical_to_logical >= 0
    expected = np.take_along_axis(read, np.maximum(placement.physical_to_logical, 0), axis=1)
    wrong = np.argwhere(filled & (held != expected))
    if len(wrong):
        layer, slot = (int(v) for v in wrong[0])
        expert = int(placement.physical_to_logical[layer, slot])
        raise WrongExpertError(
            f"rank {slot // placement.slots_per_rank} holds other weights in slot {slot} of layer "
            f"{layout.layers[layer].layer_id} than those of expert {expert}, which the plan puts "
            f"there ({len(wrong)} of {int(filled.sum())} slots are wrong)",
            "do all hosts have the same checkpoint?",
        )
    return int(filled.sum())


def checksum(weights: list[Tensor]) -> int:
    """CRC-32 of some weights' bytes, one after the other."""
    value = 0
    for tensor in weights:
        raw = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
        value = zlib.crc32(raw.data, value)
    return value


def _read(layout: ModelLayout, mapping: Mapping, layer: int, expert: int) -> list[Tensor]:
    path = layout.layers[layer].experts
    return [
        mapping.read_expert(f"{path}.{name}", expert, layout.num_experts, shape)[0].to(layout.dtype)
        for name, shape in layout.expert_parameters.items()
    ]


def _merged(table: NDArray[np.int64], transport: Transport) -> NDArray[np.int64]:
    """What all ranks know together; -1 where nobody knows."""
    rows = torch.from_numpy(table.reshape(1, -1).copy()).view(torch.uint8).to(transport.device)
    most = [1] * transport.num_ranks
    parts, _ = all_gather(transport, rows, most, "the exchange of checksums", Counters(0))
    tables = [part.cpu().contiguous().view(torch.int64).numpy() for part in parts]
    merged: NDArray[np.int64] = np.max(tables, axis=0).reshape(table.shape)
    return merged

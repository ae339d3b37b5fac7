"""Bringing tensors from the device to the host without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """Tensors on their way to the host.

    On CUDA they are copied into pinned memory on the device's current stream, behind what
    computes them, and an event tells when they have arrived. Tensors on the CPU are taken as they
    are: hand over ones that nothing changes later.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._host: list[Tensor] = []
        events: dict[torch.device, Any] = {}
        for tensor in tensors:
            if tensor.device.type == "cpu":
                self._host.append(tensor)
                continue
            if tensor.device.type != "cuda":
                self._host.append(tensor.to("cpu"))
                continue
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            with torch.cuda.device(tensor.device):
                pinned.copy_(tensor, non_blocking=True)
                events.setdefault(tensor.device, torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._host.append(pinned)
        for device, event in events.items():
            with torch.cuda.device(device):
                event.record()
        self._events = list(events.values())

    def is_done(self) -> bool:
        """Whether all have arrived."""
        return all(event.query() for event in self._events)

    def arrays(self) -> list[NDArray[Any]]:
        """The values; waits for those still on their way. Floats come as float32."""
        for event in self._events:
            event.synchronize()
        return [_to_numpy(tensor) for tensor in self._host]


def stack_layers(tensors: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Stack tensors of L layers that are alike in device and shape, to copy them at once.

    Returns:
        (indices of the layers, [l, ...] stacked) for each kind.
    """
    try:
        return [(list(range(len(tensors))), torch.stack(tensors))]  # type: ignore[arg-type]
    except RuntimeError:
        kinds: dict[Any, list[int]] = {}
        for i, tensor in enumerate(tensors):
            kinds.setdefault((tensor.device, tensor.shape), []).append(i)
        return [(places, torch.stack([tensors[i] for i in places])) for places in kinds.values()]


def narrow(ids: Tensor, num_experts: int) -> Tensor:
    """Ids in the smallest type that holds them, where that makes a copy to the host smaller."""
    if ids.device.type == "cpu":
        return ids
    return ids.to(torch.int16 if num_experts <= np.iinfo(np.int16).max // 2 else torch.int32)


def own(tensor: Tensor) -> Tensor:
    """A tensor of the user's that they may change later: on the CPU, a copy of it."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    found: NDArray[Any] = tensor.detach().numpy()
    return found

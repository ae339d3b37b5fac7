"""Bytes that a weight takes as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Storage:
    """Bytes of one weight.

    Attributes:
        expert_bytes: of an expert's weight, scales included.
        linear_bytes: of a weight of any other linear layer that is converted.
        plain_bytes: of everything else.
        unconverted: parts of names of layers that stay plain.
    """

    expert_bytes: float = 2.0
    linear_bytes: float = 2.0
    plain_bytes: float = 2.0
    unconverted: tuple[str, ...] = ()

    def converts(self, name: str) -> bool:
        """Whether the linear layer of this parameter is stored with `linear_bytes`."""
        return not any(part.strip("*.") in name for part in self.unconverted)


FP8_BLOCKS = 1 + 4 / (128 * 128)  # a float32 scale per 128 x 128 weights
MXFP4 = 0.5 + 1 / 32  # an 8-bit scale per 32 weights (OCP Microscaling formats, 2023)


def storage_of(quantization: Any) -> Storage | None:
    """How a `quantization_config` stores weights: without one bfloat16; None if it is unknown."""
    if quantization is None:
        return Storage()
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    method = str(quantization.get("quant_method", ""))
    unconverted = (*(quantization.get("modules_to_not_convert") or ()), "lm_head")
    if method == "fp8":
        block = quantization.get("weight_block_size")
        each = 1 + 4 / (block[0] * block[1]) if block else 1.0
        return Storage(each, each, 2.0, unconverted)
    if method == "fbgemm_fp8":
        return Storage(1.0, 1.0, 2.0, unconverted)
    if method == "mxfp4":
        return Storage(MXFP4, 2.0, 2.0)
    if method in ("gptq", "awq"):
        bits, group = quantization.get("bits"), quantization.get("group_size") or 128
        if isinstance(bits, int):
            each = bits / 8 + 2 / group + bits / 8 / group
            return Storage(each, each, 2.0, unconverted)
    return None

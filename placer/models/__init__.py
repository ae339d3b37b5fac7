"""Dimensions of models: presets, checkpoints, and what they take of a rank's memory."""

from placer.models.memory import RankMemory, check_memory, memory_of
from placer.models.presets import PRESETS
from placer.models.resolving import load_shape
from placer.models.shape import ModelShape

__all__ = [
    "PRESETS",
    "ModelShape",
    "RankMemory",
    "check_memory",
    "load_shape",
    "memory_of",
]

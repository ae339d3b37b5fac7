"""`RankModel`: everything that one rank does with a model and a plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from placer.placement import Placement
from placer.plan import Dispatch
from placer.runtime.checkpoint import open_checkpoint
from placer.runtime.context import RankContext
from placer.runtime.counters import Counters
from placer.runtime.engine import Engine
from placer.runtime.generate import Generator
from placer.runtime.layout import ModelLayout, read_layout
from placer.runtime.loading import load_share
from placer.runtime.mapping import Mapping
from placer.runtime.memory import LoadMemory
from placer.runtime.recording import Recorder
from placer.runtime.transport import Transport


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that shares can be loaded from.

    Attributes:
        layout: of the model.
        mapping: which tensors make which parameter.
    """

    layout: ModelLayout
    mapping: Mapping


def open_source(folder: Path, dtype: str = "auto") -> Source:
    """Look at a checkpoint; no weights are read.

    Raises:
        BadFileError: the folder is no complete checkpoint.
        PlacerError: the model cannot be split.
    """
    layout = read_layout(folder, dtype)
    return Source(layout, Mapping(open_checkpoint(folder), layout.model))


@dataclass(frozen=True, eq=False)
class RankModel:
    """A rank's share of a model, ready to generate with the other ranks.

    Attributes:
        memory: what loading took.
        generator: generates.
        counters: what was sent and how long it took; `reset()` it after a warm-up.
        recorder: which experts tokens took, where that was asked for.
    """

    memory: LoadMemory
    generator: Generator
    counters: Counters
    recorder: Recorder | None


def load_rank_model(
    source: Source,
    placement: Placement,
    transport: Transport,
    dispatch: Dispatch,
    *,
    deduplicate_nodes: bool = False,
    record: bool = False,
) -> RankModel:
    """Load this rank's share and make it part of the group.

    Args:
        source: the checkpoint.
        placement: where the experts are.
        transport: from `joined`.
        dispatch: how tokens travel.
        deduplicate_nodes: under `alltoall`, one copy of a token per other node.
        record: keep which experts tokens took.
    """
    model, memory = load_share(
        source.layout, source.mapping, placement, transport.rank, transport.device
    )
    recorder = Recorder() if record else None
    engine = Engine(
        source.layout, model, placement, transport,
        deduplicate_nodes=deduplicate_nodes, recorder=recorder,
    )  # fmt: skip
    return RankModel(memory, Generator(engine, dispatch), engine.counters, recorder)


def device_of(context: RankContext) -> torch.device:
    """This rank's GPU where there are some and PLACER_DEVICE does not say cpu, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("PLACER_DEVICE") != "cpu":
        device = torch.device("cuda", context.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")

"""`RankModel`: everything that one rank does with a model and a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from placer.errors import UsageError
from placer.placement import Placement
from placer.plan import Dispatch
from placer.runtime.checkpoint import open_checkpoint
from placer.runtime.checksums import verify
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
        num_checked: slots of all ranks whose checksums were right; None when not asked for.
        engine: the model, with this rank's experts.
        generator: generates.
        counters: what was sent and how long it took; `reset()` it after a warm-up.
        recorder: which experts tokens took, where that was asked for.
    """

    memory: LoadMemory
    num_checked: int | None
    engine: Engine
    generator: Generator
    counters: Counters
    recorder: Recorder | None

    def under(self, dispatch: Dispatch, *, deduplicate_nodes: bool = False) -> RankModel:
        """The same weights with another dispatch model; they take turns."""
        generator = Generator(self.engine, dispatch, deduplicate_nodes=deduplicate_nodes)
        return replace(self, generator=generator)


def load_rank_model(
    source: Source,
    placement: Placement,
    transport: Transport,
    dispatch: Dispatch,
    *,
    deduplicate_nodes: bool = False,
    record: bool = False,
    check: bool = False,
    others: RankModel | None = None,
) -> RankModel:
    """Load this rank's share and make it part of the group.

    Args:
        source: the checkpoint.
        placement: where the experts are.
        transport: from `joined`.
        dispatch: how tokens travel.
        deduplicate_nodes: under `alltoall`, one copy of a token per other node.
        record: keep which experts tokens took.
        check: prove by checksums that every slot of every rank holds the expert that it should.
        others: a loaded model of the same checkpoint; what is not an expert is shared with it.

    Raises:
        WrongExpertError: one does not.
    """
    model, memory = load_share(
        source.layout, source.mapping, placement, transport.rank, transport.device,
        None if others is None else others.engine.model,
    )  # fmt: skip
    num_checked = None
    if check:
        stacks = [model.get_submodule(layer.experts) for layer in source.layout.layers]
        num_checked = verify(source.layout, source.mapping, placement, stacks, transport)
    recorder = Recorder() if record else None
    engine = Engine(source.layout, model, placement, transport, recorder=recorder)
    generator = Generator(engine, dispatch, deduplicate_nodes=deduplicate_nodes)
    return RankModel(memory, num_checked, engine, generator, engine.counters, recorder)


def device_of(context: RankContext, wanted: str = "auto") -> torch.device:
    """Where a rank's weights go.

    Args:
        context: who the rank is.
        wanted: "cpu", "cuda", or "auto": a GPU of its own if its host has enough, else the CPU.

    Raises:
        UsageError: GPUs are asked for, and the host has fewer than ranks.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {wanted!r}", "use auto, cpu or cuda")
    num_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if num_gpus >= context.local_size:
        device = torch.device("cuda", context.local_rank)
        torch.cuda.set_device(device)
        return device
    if wanted == "cuda":
        raise UsageError(
            f"{context.local_size} ranks share a host with {num_gpus} GPUs; each needs its own",
            "run on more hosts, or with --device cpu",
        )
    return torch.device("cpu")

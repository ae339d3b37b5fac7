"""Ranks that misbehave; imported by the ranks' processes."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import torch

from placer.placement import Placement
from placer.runtime.bank import Bank
from placer.runtime.checksums import verify
from placer.runtime.context import RankContext
from placer.runtime.counters import Counters
from placer.runtime.loading import load_share
from placer.runtime.meeting import joined
from placer.runtime.rank import load_rank_model, open_source

CPU = torch.device("cpu")


def _sign(context: RankContext, folder: Path) -> None:
    """Leave the process id where the test finds it."""
    (folder / f"pid-{context.rank}").write_text(str(os.getpid()))


def signal_in_a_layer(
    context: RankContext, pids: Path, model: Path, placement: Placement, victim: int, number: int
) -> None:
    """Generate; one rank sends itself a signal in the middle of a layer."""
    _sign(context, pids)
    source = open_source(model, "float32")
    if context.rank == victim:
        original = Bank.partial_sums
        calls = []

        def partial_sums(self: Bank, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return original(self, *arguments)

        Bank.partial_sums = partial_sums  # type: ignore[method-assign]
    with joined(context, CPU) as transport:
        rank = load_rank_model(source, placement, transport, "alltoall")
        rank.generator.generate([[1, 2, 3], [4, 5]], 4)


def expect_one_more(context: RankContext, pids: Path) -> None:
    """Wait for a rank that nobody started."""
    _sign(context, pids)
    with joined(dataclasses.replace(context, num_ranks=context.num_ranks + 1), CPU):
        raise AssertionError("nobody else came")


def meet_nobody(context: RankContext, pids: Path, port: int) -> None:
    """Look for a store where there is none."""
    _sign(context, pids)
    with joined(dataclasses.replace(context, port=port), CPU):
        raise AssertionError("there is no store")


def open_the_port(context: RankContext, pids: Path, port: int) -> None:
    """Rank 0 opens the store itself, as without a launcher."""
    _sign(context, pids)
    own = dataclasses.replace(context, port=port, serves_store=context.rank == 0)
    with joined(own, CPU) as transport:
        transport.barrier("the test", Counters(0))


def divide_by_zero(context: RankContext, pids: Path, victim: int) -> None:
    """One rank has a bug, while the others wait for it."""
    _sign(context, pids)
    with joined(context, CPU) as transport:
        if context.rank == victim:
            context.rank / 0
        transport.barrier("the test", Counters(0))


def hang(context: RankContext, pids: Path) -> None:
    """Never end."""
    _sign(context, pids)
    signal.pause()


def load(context: RankContext, model: Path, placement: Placement) -> int | None:
    """Load and check."""
    source = open_source(model, "float32")
    with joined(context, CPU) as transport:
        return load_rank_model(source, placement, transport, "alltoall", check=True).num_checked


def load_and_swap(context: RankContext, model: Path, placement: Placement, victim: int) -> int:
    """Load, exchange two experts in one rank's memory, check."""
    source = open_source(model, "float32")
    own, _ = load_share(source.layout, source.mapping, placement, context.rank, CPU)
    stacks = [own.get_submodule(layer.experts) for layer in source.layout.layers]
    if context.rank == victim:
        with torch.no_grad():
            for name in source.layout.expert_parameters:
                weights = getattr(stacks[1], name)
                weights[[0, 1]] = weights[[1, 0]]
    with joined(context, CPU) as transport:
        return verify(source.layout, source.mapping, placement, stacks, transport)

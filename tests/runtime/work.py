"""What tests have ranks do; imported by the ranks' processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from placer.placement import Placement
from placer.plan import Dispatch
from placer.runtime.context import RankContext
from placer.runtime.meeting import joined
from placer.runtime.memory import LoadMemory
from placer.runtime.rank import Source, load_rank_model, open_source
from placer.runtime.recording import Fragment
from tests.runtime.models import HOMES, NEW_TOKENS, PROMPTS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One way to run one model.

    Attributes:
        folder: the checkpoint.
        placement: where the experts are.
        dispatch: how tokens travel.
        by_node: one copy of a token per other node.
        stops: tokens that end a request.
    """

    folder: Path
    placement: Placement
    dispatch: Dispatch
    by_node: bool = False
    stops: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ran:
    """What one rank made of a case."""

    tokens: list[list[int]]
    logits: dict[tuple[int, int], np.ndarray]
    counters: dict[str, object]
    messages: np.ndarray
    hidden_bytes: np.ndarray
    pairs: np.ndarray
    fragments: list[Fragment]
    memory: LoadMemory


def run_cases(context: RankContext, cases: list[Case]) -> list[Ran]:
    """Run every case one after the other in the same processes."""
    sources: dict[Path, Source] = {}
    found = []
    with joined(context, CPU) as transport:
        for case in cases:
            if case.folder not in sources:
                sources[case.folder] = open_source(case.folder, "float32")
            rank = load_rank_model(
                sources[case.folder], case.placement, transport, case.dispatch,
                deduplicate_nodes=case.by_node, record=True,
            )  # fmt: skip
            homes = [home % context.num_ranks for home in HOMES]
            made = rank.generator.generate(
                PROMPTS, NEW_TOKENS, homes=homes, stop_tokens=case.stops, keep_logits=True
            )
            counters = rank.counters
            assert rank.recorder is not None
            found.append(
                Ran(
                    made.tokens,
                    {key: value.numpy() for key, value in made.logits.items()},
                    counters.document(),
                    counters.messages,
                    counters.hidden_bytes,
                    counters.pairs,
                    rank.recorder.fragments,
                    rank.memory,
                )
            )
    return found

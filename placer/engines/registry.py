"""Engines by name, and what placer knows of each: recordings that it reads, plans both ways."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from placer.errors import UsageError
from placer.plan import Plan


@dataclass(frozen=True)
class PlanHints:
    """What the user says where an engine's plan does not; None = not said.

    Attributes:
        gpus: ranks.
        nodes: hosts of these ranks.
        num_experts: E.
        layer_ids: real numbers of the MoE layers.
    """

    gpus: int | None = None
    nodes: int | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ExportOptions:
    """What the user says of the model where a plan does not; None = not said.

    Attributes:
        num_layers: hidden layers of the model, dense ones included.
    """

    num_layers: int | None = None


@dataclass(frozen=True)
class PlanFormat:
    """One kind of file with a placement in it.

    Attributes:
        title: what it is, in a few words.
        suffix: of such files; "" for folders.
        recognises: whether a path looks like one; cheap, and never raises.
        read: a plan from it. Raises BadFileError: damaged, or not of this kind; UsageError: a hint
            is missing or does not fit.
        write: the plan as the engine loads it; returns what the user should know, a sentence
            each. Raises InfeasibleError: the engine cannot hold this placement.
    """

    title: str
    suffix: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, PlanHints], Plan]
    write: Callable[[Plan, Path, ExportOptions, bool], list[str]]


@dataclass(frozen=True)
class Engine:
    """A program that serves models or places experts.

    Attributes:
        name: as on the command line.
        about: one line.
        plans: module and attribute of each `PlanFormat`, the usual one first.
    """

    name: str
    about: str
    plans: tuple[str, ...] = ()

    def plan_formats(self) -> Iterator[PlanFormat]:
        """Its kinds of plan, the usual one first."""
        for reference in self.plans:
            module, attribute = reference.split(":")
            found: PlanFormat = getattr(importlib.import_module(module), attribute)
            yield found


ENGINES: dict[str, Engine] = {}


def engine(name: str) -> Engine:
    """The engine of this name.

    Raises:
        UsageError: placer reads and writes no plans of it.
    """
    if name not in ENGINES:
        raise UsageError(f"placer has no plans of {name!r}", f"engines: {', '.join(ENGINES)}")
    return ENGINES[name]


def plan_format_of(name: str, path: Path) -> PlanFormat | None:
    """The kind of plan of this engine that `path` looks like; None when it looks like none."""
    if name not in ENGINES:
        return None
    for candidate in ENGINES[name].plan_formats():
        if candidate.recognises(path):
            return candidate
    return None

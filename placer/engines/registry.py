"""Engines by name, and the kinds of plan that placer reads from them and writes for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from placer.errors import UsageError
from placer.plan import Plan


@dataclass(frozen=True)
class PlanHints:
    """What the user says where an engine's file does not; None = not said.

    Attributes:
        gpus: ranks (G).
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
    """What the user says of the export.

    Attributes:
        num_layers: hidden layers of the model, dense ones included; None = not said.
        fill_empty: put further copies into empty slots, where the engine knows none.
        force: replace the file if it exists.
    """

    num_layers: int | None = None
    fill_empty: bool = False
    force: bool = False


@dataclass(frozen=True, eq=False)
class ImportedPlan:
    """An engine's placement.

    Attributes:
        plan: without prediction and certificate.
        warnings: what a user should know, a sentence each.
    """

    plan: Plan
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlanFormat:
    """One kind of file with a placement in it.

    Attributes:
        title: what it is, in a few words.
        suffix: of such files.
        recognises: whether a path looks like one; cheap, and never raises.
        read: Raises BadFileError: damaged, or not of this kind; UsageError: a hint is missing or
            does not fit.
        write: the plan as the engine loads it; returns what the user should know, a sentence
            each. Raises InfeasibleError: the engine cannot hold this placement.
    """

    title: str
    suffix: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, PlanHints], ImportedPlan]
    write: Callable[[Plan, Path, ExportOptions], list[str]]


@dataclass(frozen=True)
class Engine:
    """A program that serves models or places experts.

    Attributes:
        name: as on the command line.
        about: one line.
        plans: modules of `placer.engines.plans`, the usual kind first; each holds its
            `PlanFormat` as FORMAT.
    """

    name: str
    about: str
    plans: tuple[str, ...]

    def plan_formats(self) -> Iterator[PlanFormat]:
        """Its kinds of plan, the usual one first."""
        for name in self.plans:
            module = importlib.import_module(f"placer.engines.plans.{name}")
            found: PlanFormat = module.FORMAT
            yield found

    def format_to_write(self, path: Path) -> PlanFormat:
        """Its kind of plan that a path of this name asks for.

        Raises:
            UsageError: the engine loads no files that end so.
        """
        formats = list(self.plan_formats())
        for candidate in formats:
            if path.suffix == candidate.suffix:
                return candidate
        suffixes = " or ".join(candidate.suffix for candidate in formats)
        raise UsageError(
            f"{path}: a plan for {self.name} is a {suffixes} file",
            f"-o {path.stem or 'plan'}{formats[0].suffix}",
        )


ENGINES = {
    entry.name: entry
    for entry in (
        Engine("sglang", "--init-expert-location", ("sglang_json", "sglang_pt")),
        Engine("vllm", "PLACER_VLLM_PLAN", ("vllm",)),
        Engine("tensorrt-llm", "MoE load balancer config", ("tensorrt_llm",)),
        Engine("vllm-ascend", "expert_map_path", ("vllm_ascend",)),
        Engine("omni-infer", "placement pattern", ("omni_infer",)),
        Engine("eplb", "tensors of DeepSeek's EPLB", ("eplb",)),
        Engine("fastdeploy", "rearrange-experts.json", ("fastdeploy",)),
        Engine("rank-lists", "expert ids of each rank, per layer", ("rank_lists",)),
    )
}


def engine_named(name: str) -> Engine:
    """The engine of this name.

    Raises:
        UsageError: placer reads and writes no plans of it.
    """
    if name not in ENGINES:
        raise UsageError(
            f"placer writes no plans for {name!r}", f"engines: {', '.join(sorted(ENGINES))}"
        )
    return ENGINES[name]


def recognised_plan(name: str, path: Path) -> PlanFormat | None:
    """The kind of plan of this engine that `path` looks like; None when it looks like none."""
    if name not in ENGINES:
        return None
    formats = ENGINES[name].plan_formats()
    return next((candidate for candidate in formats if candidate.recognises(path)), None)

"""The demo's pieces: the shipped model, its prompts, and the pipeline from one to a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placer.errors import PlacerError

Progress = Callable[[str], None]

NUM_RANKS = 8
PROMPTS_PER_WORKLOAD = 40
NEW_TOKENS = 24


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo made.

    Attributes:
        trace, plan: paths.
        summary: of the tracing run.
        analysis, comparison, plan_document: documents for tables.
    """

    trace: Path
    plan: Path
    summary: dict[str, Any]
    analysis: dict[str, Any]
    comparison: dict[str, Any]
    plan_document: dict[str, Any]

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "trace": str(self.trace),
            "plan": str(self.plan),
            "tracing": self.summary,
            "comparison": self.comparison,
            "prediction": self.plan_document["prediction"],
            "certificate": self.plan_document["certificate"],
        }


def _shipped(name: str) -> Path | None:
    """A folder of examples/, in a checkout or in an installed package."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "shipped" / name, here.parent / "examples" / name):
        if candidate.is_dir():
            return candidate
    return None


def find_model() -> Path | None:
    """The small trained model that placer ships, or None."""
    return _shipped("model")


def demo_prompts() -> list[Path]:
    """Prompt files of the shipped workloads, one per workload."""
    folder = _shipped("prompts")
    return [] if folder is None else sorted(folder.glob("*.jsonl"))


def _use_one_thread() -> None:
    """The model is so small that on a busy machine torch's threads only wait for each other."""
    import torch

    torch.set_num_threads(1)


def run_demo(output: Path, *, seed: int, force: bool, progress: Progress) -> Demo:
    """Trace the shipped model, analyze, compare solvers, write a plan.

    Args:
        output: folder for the trace and the plan; made if missing.
        seed: of the split and the solvers.
        force: replace an earlier demo in `output`.
        progress: told what is being done.

    Raises:
        PlacerError: this install ships no model.
    """
    from placer.affinity.analysis import analyse
    from placer.comparison import compare_solvers
    from placer.plan import write_plan
    from placer.planning import DEFAULT_MAX_IMBALANCE, Settings, make_plan, open_traces
    from placer.report.tracing import tracing_document
    from placer.tracer import read_prompts, trace_model

    model, prompt_files = find_model(), demo_prompts()
    if model is None or not prompt_files:
        raise PlacerError(
            "this install ships no demo model", "clone the repository and run `make demo`"
        )
    output.mkdir(parents=True, exist_ok=True)
    trace, plan_path = output / "trace", output / "plan.json"
    prompts = [
        prompt for file in prompt_files for prompt in read_prompts(file)[:PROMPTS_PER_WORKLOAD]
    ]
    progress(f"tracing the shipped model on {len(prompts)} prompts")
    _use_one_thread()
    summary = trace_model(
        str(model),
        prompts,
        trace,
        max_new_tokens=NEW_TOKENS,
        batch_size=16,
        dtype="float32",  # several times faster than bfloat16 on most CPUs
        force=force,
        progress=lambda state: progress(str(state)),
    )
    progress("analyzing the trace")
    source = open_traces([trace])[0]
    analysis = {"path": str(trace), **analyse(source).summary([NUM_RANKS])}
    settings = Settings(
        num_ranks=NUM_RANKS, max_imbalance=DEFAULT_MAX_IMBALANCE, cap_is_default=True, seed=seed
    )
    names = ["contiguous", "random", "eplb", "exflow", "local_search"]
    comparison = compare_solvers([source], replace(settings, time_limit_s=20.0), names, progress)
    plan = make_plan([source], settings, progress)
    write_plan(plan, plan_path, force=force)
    return Demo(
        trace=trace,
        plan=plan_path,
        summary=tracing_document(summary),
        analysis=analysis,
        comparison=comparison,
        plan_document={"path": str(plan_path), **plan.to_document()},
    )

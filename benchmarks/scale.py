"""What hundreds of experts cost, and what more time would bring; results in docs/scale.md.

    python benchmarks/scale.py --results scale-results --write docs/scale.md
    python benchmarks/scale.py --results scale-results --only 58x256/144

A synthetic trace (benchmarks/synthetic.py) of each instance is solved as `placer solve` does it,
within each of TARGETS seconds on 2 cores, and without a limit, with --effort times the usual
proposals; printed is by how much the short runs exceed the long one. Machines that run this may be
shared, so the clock of all limits is processor time over two cores. Every run is a process of its
own, so that its peak memory is its own, and what is done already under --results is not done again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic import synthetic_trace

import solvers
from placer.files import write_json
from placer.planning import Settings, build_problem
from placer.trace import MemorySource, read_npz, write_npz
from solvers import layers as solver_layers
from solvers.rehearsing import rehearse

CORES = 2
TARGETS = (10.0, 30.0)
TOKENS = 65536


@dataclass(frozen=True)
class Instance:
    """A model and how it is served."""

    layers: int
    experts: int
    ranks: int
    nodes: int
    slots: int
    model: str
    cap: float = 1.10

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.experts}/{self.ranks}x{self.slots}"


INSTANCES = (
    Instance(58, 256, 32, 4, 8, "DeepSeek-V3"),
    Instance(58, 256, 64, 8, 4, "DeepSeek-V3", 1.25),  # none is below 1.19
    Instance(58, 256, 32, 4, 9, "DeepSeek-V3, 288 slots"),
    Instance(58, 256, 144, 18, 2, "DeepSeek-V3, 288 slots", 1.60),
    Instance(94, 128, 16, 2, 8, "Qwen3-235B"),
    Instance(60, 384, 64, 8, 6, "Kimi-K2"),
)


@dataclass
class ProcessorBudget(solvers.Budget):
    """A budget whose clock is processor time over the number of cores."""

    _start: float = field(default_factory=lambda: time.process_time() / CORES)

    def elapsed(self) -> float:
        return time.process_time() / CORES - self._start


def run_one(instance: Instance, seconds: float | None, effort: int, trace: Path) -> dict[str, Any]:
    """Pose and solve an instance in this process."""
    solver_layers.EFFORT = effort
    start = time.process_time()
    source = MemorySource(read_npz(trace))
    settings = Settings(
        num_ranks=instance.ranks,
        num_nodes=instance.nodes,
        slots_per_rank=instance.slots,
        max_imbalance=instance.cap,
    )
    problem = build_problem(source, settings, lambda _: None)
    del source
    posing = time.process_time() - start
    rehearse(problem, solvers.get("local_search"), solvers.Budget())  # this clock can't pause
    budget = ProcessorBudget(seconds)
    result = solvers.solve(problem, "local_search", budget=budget)
    return {
        "instance": instance.name,
        "limit_s": seconds,
        "effort": effort,
        "traffic": result.objective,
        "messages": result.parts["messages_alltoall"],
        "imbalance": solvers.capped_imbalance(result.parts),
        "gap": result.gap,
        "spent_s": budget.elapsed(),
        "termination": result.termination,
        "posing_s": posing / CORES,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def trace_of(instance: Instance, folder: Path) -> Path:
    """The synthetic trace of an instance's model, made once."""
    path = folder / f"trace-{instance.layers}x{instance.experts}.npz"
    if not path.exists():
        made = synthetic_trace(
            num_layers=instance.layers,
            num_experts=instance.experts,
            top_k=8,
            num_tokens=TOKENS,
        )
        write_npz(made, path)
    return path


def runs(folder: Path) -> list[dict[str, Any]]:
    """What was done already."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("run-*.json"))]


def table(done: list[dict[str, Any]]) -> str:
    """As markdown: a row per instance that was solved for long and for each target."""
    lines = [
        "| model | layers x experts | ranks x slots | cap | long run | imbalance |"
        + "".join(f" {target:.0f} s |" for target in TARGETS)
        + " gap proven | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: |" + " ---: |" * (len(TARGETS) + 2),
    ]
    for instance in INSTANCES:
        own = {run["limit_s"]: run for run in done if run["instance"] == instance.name}
        if None not in own or not all(target in own for target in TARGETS):
            continue
        best = own[None]
        kept = [f"{100 * (own[t]['traffic'] / best['traffic'] - 1):+.2f} %" for t in TARGETS]
        for number, target in enumerate(TARGETS):
            if own[target]["imbalance"] > instance.cap + 1e-9:
                kept[number] += f" ({own[target]['imbalance']:.3f})"
        lines.append(
            f"| {instance.model} | {instance.layers} x {instance.experts} "
            f"| {instance.ranks} x {instance.slots} | {instance.cap:.2f} | {best['traffic']:.3f} "
            f"| {best['imbalance']:.3f} | {' | '.join(kept)} | {100 * best['gap']:.0f} % "
            f"| {max(run['peak_gb'] for run in own.values()):.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do what was not done yet, print the table, write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=Path("scale-results"))
    parser.add_argument("--only", default="", help="instances whose name begins so")
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    parser.add_argument("--effort", type=int, default=4, help="of the long runs")
    parser.add_argument("--one", metavar="NAME", help="solve one with --effort, print JSON")
    parser.add_argument("--seconds", type=float, help="of --one; else no limit")
    arguments = parser.parse_args()
    folder: Path = arguments.results
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        instance = next(i for i in INSTANCES if i.name == arguments.one)
        trace = trace_of(instance, folder)
        print(json.dumps(run_one(instance, arguments.seconds, arguments.effort, trace)))
        return
    for instance in (i for i in INSTANCES if i.name.startswith(arguments.only)):
        trace_of(instance, folder)
        for seconds in (*TARGETS, None):
            path = folder / f"run-{instance.name.replace('/', '-')}-{seconds or 'long'}.json"
            if path.exists():
                continue
            how = [f"--effort={arguments.effort}"]
            if seconds is not None:
                how = ["--effort=1", f"--seconds={seconds}"]
            command = [sys.executable, __file__, f"--results={folder}", f"--one={instance.name}"]
            done = subprocess.run([*command, *how], stdout=subprocess.PIPE, check=True)
            document = json.loads(done.stdout)
            write_json(path, document)
            print(document, flush=True)
    text = table(runs(folder))
    print(text)
    if arguments.write:
        before, _, rest = arguments.write.read_text().partition("<!-- scale -->\n")
        after = rest.partition("<!-- /scale -->\n")[2]
        arguments.write.write_text(f"{before}<!-- scale -->\n{text}<!-- /scale -->\n{after}")


if __name__ == "__main__":
    main()

"""Who is dominated by whom: every method against the frontier that placer gives.

    python benchmarks/published.py --trace FILE --gpus 4 8 16 --nodes 1 2 --spare 0 1 --json points
    python benchmarks/published.py --show points

Every method is fitted to one half of the requests of the traces (by default the canned ones) and
judged by replay of the other half, for each number of ranks, nodes and redundant slots per rank.
Traffic is messages per token and layer, those between nodes at their price. A plan dominates
another that is no better in traffic or imbalance, and worse in one of them. placer's plans are
those of `placer solve --pareto`, chosen and numbered on the fitted half.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import solvers
from placer.errors import PlacerError
from placer.evaluation import evaluate
from placer.planning import (
    Parts,
    Settings,
    build_problem,
    open_traces,
    placement_of,
    run_solver,
    split_sources,
)

ROOT = Path(__file__).resolve().parent.parent
BATCH_TOKENS = 256


@dataclass(frozen=True)
class Point:
    """One plan and its held-out figures.

    Attributes:
        name: the method, or the number of a plan on placer's frontier.
        mine: whether placer made it.
        messages, node_messages: per token and layer, between ranks and between nodes.
        traffic: what both cost.
        imbalance, batch_imbalance: max / mean rank load, of all tokens and within batches.
        seconds: processor time of the solver; of the whole frontier for each of its plans.
    """

    name: str
    mine: bool
    messages: float
    node_messages: float
    traffic: float
    imbalance: float
    batch_imbalance: float
    seconds: float

    def dominates(self, other: Point) -> bool:
        """Whether nothing about this plan is worse and something is better."""
        return (
            self.traffic <= other.traffic
            and self.imbalance <= other.imbalance
            and (self.traffic, self.imbalance) != (other.traffic, other.imbalance)
        )


def measure(parts: Parts, settings: Settings, methods: Sequence[str]) -> Iterator[Point]:
    """Fit and judge every method, and the plans of the frontier."""
    problem = build_problem(parts.fit, settings, lambda _: None)
    for label, mine, result, seconds in fitted(problem, settings, methods):
        figures = evaluate(
            placement_of(problem, result),
            {},
            parts.judge,
            scope=parts.scope,
            dispatch=settings.dispatch,
            batch_tokens=BATCH_TOKENS,
            num_resamples=0,
        ).metrics
        messages = figures[f"messages_{settings.dispatch}"]["value"]
        crossing = figures.get(f"node_messages_{settings.dispatch}", {"value": 0.0})["value"]
        yield Point(
            name=label,
            mine=mine,
            messages=messages,
            node_messages=crossing,
            traffic=messages + problem.node_weight * crossing,
            imbalance=figures["imbalance"]["value"],
            batch_imbalance=figures["imbalance_batches_mean"]["value"],
            seconds=seconds,
        )


def fitted(
    problem: solvers.Problem, settings: Settings, methods: Sequence[str]
) -> Iterator[tuple[str, bool, solvers.Result, float]]:
    """What each plan is called, whether placer made it, the plan, and processor seconds."""
    whole = replace(problem, scenario_load=None, scenario=None, workload=None, folds=False)
    for name in methods:
        started = time.process_time()
        try:
            result = run_solver(whole, replace(settings, solver=name))
        except PlacerError as error:
            print(f"{name}: {error.message}", flush=True)
            continue
        yield name, False, result, time.process_time() - started
    started = time.process_time()
    budget = solvers.Budget(settings.time_limit_s)
    results = solvers.frontier(problem, seed=settings.seed, budget=budget)
    seconds = time.process_time() - started
    for number, result in enumerate(results):
        yield f"placer, {number:02d}", True, result, seconds


def table(points: Sequence[Point]) -> str:
    """A line per plan: its figures, and how placer's plans compare.

    `fewer`: traffic that placer saves at no more than 0.03 above the method's imbalance.
    `at its traffic`: placer's least imbalance at no more traffic than the method's.
    """
    mine = [point for point in points if point.mine]
    lines = [
        f"{'method':26}{'messages':>9}{'nodes':>7}{'traffic':>8}{'imbal.':>8}{'batches':>8}"
        f"{'cpu s':>7}{'fewer':>8}{'at its traffic':>16}  dominated by"
    ]
    for point in points:
        line = (
            f"{point.name:26}{point.messages:9.3f}{point.node_messages:7.3f}{point.traffic:8.3f}"
            f"{point.imbalance:8.3f}{point.batch_imbalance:8.3f}{point.seconds:7.1f}"
        )
        others = [p for p in points if p.mine != point.mine]
        above = [p.name for p in others if p.dominates(point)]
        below = [p.name for p in others if point.dominates(p)]
        said = ", ".join(name.removeprefix("placer, ") for name in above)
        if point.mine:
            lines.append(f"{line}{'':24}  {said}")
            continue
        balanced = [p.traffic for p in mine if p.imbalance <= point.imbalance + 0.03]
        frugal = [p.imbalance for p in mine if p.traffic <= point.traffic]
        saved = f"{1 - min(balanced) / point.traffic:.1%}" if balanced else "none"
        level = f"{min(frugal):.3f}" if frugal else "none"
        if below:
            said += "; BETTER THAN " + ", ".join(name.removeprefix("placer, ") for name in below)
        lines.append(f"{line}{saved:>8}{level:>16}  {said or 'none'}")
    return "\n".join(lines)


def published() -> list[str]:
    """The methods that are not placer's; exflow_pulp is exflow with another back end."""
    names = [name for name in solvers.names() if solvers.get(name).source != "placer"]
    return [name for name in names if name != "exflow_pulp"]


def main() -> None:
    """Measure and print, instance by instance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, nargs="*", help="default: the canned traces")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2])
    parser.add_argument("--spare", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--solvers", help="comma-separated; default: all that are not placer's")
    parser.add_argument("--dispatch", default="alltoall", choices=("alltoall", "coherent"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, help="seconds for each solver")
    parser.add_argument("--json", type=Path, help="append a line per plan to this file")
    parser.add_argument("--show", type=Path, nargs="+", help="print such files, measure nothing")
    options = parser.parse_args()
    if options.show:
        show(options.show)
        return
    traces = options.trace or sorted(p for p in (ROOT / "traces").iterdir() if p.is_dir())
    methods = published() if options.solvers is None else options.solvers.split(",")
    methods = [name for name in methods if name]
    sources = open_traces(traces)
    num_experts = sources[0].num_experts
    for gpus, nodes, spare in itertools.product(options.gpus, options.nodes, options.spare):
        settings = Settings(
            num_ranks=gpus,
            num_nodes=nodes,
            slots_per_rank=-(-num_experts // gpus) + spare,
            dispatch=options.dispatch,
            seed=options.seed,
            time_limit_s=options.time_limit,
        )
        parts = split_sources(sources, settings)
        instance = f"{gpus} ranks, {nodes} nodes, {settings.slots_per_rank} slots per rank"
        points = []
        for point in measure(parts, settings, methods):
            points.append(point)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps({"instance": instance, **asdict(point)}) + "\n")
        print(f"\n{instance}; {parts.scope}, {options.dispatch}\n{table(points)}", flush=True)


def show(files: Sequence[Path]) -> None:
    """Print the plans of such files, instance by instance; of equal ones the last counts."""
    found: dict[str, dict[str, Point]] = defaultdict(dict)
    for line in (line for file in files for line in file.read_text().splitlines()):
        fields = json.loads(line)
        instance = fields.pop("instance")
        found[instance][fields["name"]] = Point(**fields)
    for instance, points in found.items():
        ordered = sorted(points.values(), key=lambda p: (p.mine, p.name if not p.mine else ""))
        print(f"\n{instance}\n{table(ordered)}")


if __name__ == "__main__":
    main()

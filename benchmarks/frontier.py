"""Messages against imbalance on held-out requests: the frontier that placer gives, and peers.

    python benchmarks/frontier.py --svg docs/frontier.svg

Everything is fitted to one half of the requests of the canned traces (or of --trace) and judged on
the other half. placer's points are those of `placer solve --pareto`. The figure that README.md
shows is made by this; `benchmarks/published.py` measures every method and instance.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from placer.evaluation import evaluate
from placer.files import atomic_path
from placer.planning import (
    Settings,
    build_problem,
    make_frontier,
    open_traces,
    placement_of,
    run_solver,
    split_sources,
)
from placer.report.frontier import draw_frontier
from placer.trace.source import TraceSource

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("contiguous", "eplb", "random", "exflow")


def frontier_beside_peers(
    sources: list[TraceSource], settings: Settings, peers: list[str]
) -> dict[str, Any]:
    """The document of the frontier, with the held-out figures of these solvers as its peers."""
    document = make_frontier(sources, settings).to_document()
    parts = split_sources(sources, settings)
    problem = build_problem(parts.fit, settings, lambda _: None)
    document["peers"] = {
        name: evaluate(
            placement_of(problem, run_solver(problem, replace(settings, solver=name))),
            {},
            parts.judge,
            scope=parts.scope,
            dispatch=settings.dispatch,
            seed=settings.seed,
        ).metrics
        for name in peers
    }
    return document


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, nargs="*", help="default: the canned traces")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--slots-per-rank", type=int)
    parser.add_argument("--dispatch", default="alltoall", choices=("alltoall", "coherent"))
    parser.add_argument("--solvers", default=",".join(PEERS), help="peers, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="draw the figure here")
    options = parser.parse_args()
    traces = options.trace or sorted(p for p in (ROOT / "traces").iterdir() if p.is_dir())
    settings = Settings(
        num_ranks=options.gpus,
        slots_per_rank=options.slots_per_rank,
        dispatch=options.dispatch,
        seed=options.seed,
    )
    document = frontier_beside_peers(open_traces(traces), settings, options.solvers.split(","))
    messages = document["figures"][0]
    rows = {point["plan"]: point["metrics"] for point in document["points"]} | document["peers"]
    for name, metrics in rows.items():
        figures = (metrics[figure]["value"] for figure in (messages, "imbalance"))
        print("{:18} messages {:.3f}  imbalance {:.3f}".format(name, *figures))
    if options.svg is not None:
        with atomic_path(options.svg, force=True) as temporary:
            draw_frontier(document, temporary)


if __name__ == "__main__":
    main()

"""Objective values of every solver on the canned traces, kept in values/, one file per solver.

    python tests/golden/golden.py [SOLVER ...]      # write them anew (default: every file there)

Change a file only where a solver's result was meant to change, and say so in the commit.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import solvers

ROOT = Path(__file__).resolve().parents[2]
VALUES = Path(__file__).resolve().parent / "values"
NUM_LAYERS, NUM_TOKENS, NUM_BATCHES = 4, 1400, 7
INSTANCES = {
    "8 ranks": {"ranks_per_node": 8, "slots_per_rank": 4},
    "2 nodes of 4, a spare slot": {
        "ranks_per_node": 4,
        "slots_per_rank": 5,
        "node_weight": 4.0,
    },
}
SEEDS = (0, 1)
FIGURES = (
    "messages_alltoall",
    "node_messages",
    "imbalance",
    "imbalance_batch",
    "cross_rank_fraction",
    "coactivation_cut",
)


@functools.cache
def problem_of(instance: str) -> solvers.Problem:
    """Some tokens of every canned trace, in the first layers."""
    from placer.affinity import count_chunks
    from placer.trace import make_trace, open_trace

    parts = []
    for folder in sorted(path for path in (ROOT / "traces").iterdir() if path.is_dir()):
        trace = open_trace(folder).read()
        rows = np.linspace(0, trace.num_tokens - 1, NUM_TOKENS // 7).astype(np.int64)
        parts.append((trace.experts[rows][:, :NUM_LAYERS], trace.request[rows]))
        num_experts = trace.num_experts
    experts = np.concatenate([ids for ids, _ in parts])
    request = np.concatenate([ids for _, ids in parts]).astype(np.int64)
    counts = count_chunks([make_trace(experts=experts, num_experts=num_experts)])
    return solvers.Problem(
        load=counts.load.astype(np.float64),
        num_ranks=8,
        coactivation=counts.coactivation.astype(np.float64),
        affinity=counts.affinity,
        primary_affinity=counts.primary_affinity.astype(np.float64),
        tokens=experts,
        primary=experts[:, :, 0],
        home=request % 8,
        batch=np.arange(len(experts)) * NUM_BATCHES // len(experts),
        **INSTANCES[instance],
    )


def figures_of(solver: str, instance: str, seed: int) -> dict[str, float]:
    """What a solver's placement is worth, rounded."""
    parts = solvers.solve(problem_of(instance), solver, seed=seed).parts
    return {figure: round(parts[figure], 4) for figure in FIGURES}


def contiguous_figures(instance: str) -> dict[str, float]:
    """The same of the contiguous placement."""
    return figures_of("contiguous", instance, 0)


def values_of(solver: str) -> dict[str, Any]:
    """Instance -> seed -> figures."""
    return {
        instance: {str(seed): figures_of(solver, instance, seed) for seed in SEEDS}
        for instance in INSTANCES
    }


def main() -> None:
    """Write the files."""
    names = sys.argv[1:] or sorted(path.stem for path in VALUES.glob("*.json"))
    for name in names:
        text = json.dumps(values_of(name), indent=1) + "\n"
        (VALUES / f"{name}.json").write_text(text)
        print(name, flush=True)


if __name__ == "__main__":
    main()

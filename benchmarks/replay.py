"""Replay speed against plain numpy, on the same tokens in the same run.

    python benchmarks/replay.py [--trace FILE.npz] [--json]

Prints millions of token-layer routings per second. Without --trace the trace is made up: 131,072
tokens, Zipf-like experts, 512 requests. `numpy` counts span, both kinds of messages and cross-rank
pairs and nothing else; the replay also takes node figures, rank loads and batch figures; `priced`
is the modelled step time of batches of 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from placer.cluster import load_cluster
from placer.cost import measure, replay, step_time
from placer.placement import Placement, contiguous
from placer.trace.model import ModelDims, Trace

REPEATS = 5
LABELS = (
    "numpy", "replay", "with mixed batches", "local replicas", "priced", "priced, replicas",
)  # fmt: skip
COLD = """
import time
start = time.perf_counter()
import numpy as np
from placer.cost import replay
from placer.placement import contiguous
from placer.trace.model import Trace
ids = np.zeros(1, np.int64)
trace = Trace(np.zeros((1, 1, 1), np.int16), 2, ids, ids, ids, np.zeros(1, np.uint8))
replay(trace, contiguous(1, 2, 2, 1, 2))
print(time.perf_counter() - start)
"""


def made_up(num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> Trace:
    rng = np.random.default_rng(0)
    taste = rng.permuted(np.tile(np.arange(1, num_experts + 1) ** -0.5, (num_layers, 1)), axis=1)
    experts = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        keys = rng.exponential(size=(num_tokens, num_experts)) / taste[layer]
        experts[:, layer] = np.argpartition(keys, top_k, axis=1)[:, :top_k]
    return Trace(
        experts,
        num_experts,
        np.arange(num_layers),
        np.arange(num_tokens) * 512 // num_tokens,
        np.arange(num_tokens),
        np.ones(num_tokens, np.uint8),
    )


def read(path: str) -> Trace:
    with np.load(path) as file:
        experts = file["experts"]
        index = np.arange(experts.shape[0])
        return Trace(
            experts,
            int(file["num_experts"]),
            np.arange(experts.shape[1]),
            file["request"].astype(np.int64) if "request" in file else index * 0,
            index,
            np.ones(index.size, np.uint8),
        )


def plain_numpy(trace: Trace, placement: Placement) -> tuple[float, float, float, float]:
    """Span, messages (alltoall, coherent), cross-rank fraction; every expert has one copy."""
    num_ranks = placement.num_ranks
    rank_of = placement.ranks_of_experts()[:, :, 0]
    span = alltoall = coherent = cross = pairs = 0
    before = None
    home = trace.request % num_ranks
    moving = home.copy()
    tokens = np.arange(trace.num_tokens)
    for layer in range(trace.num_layers):
        ranks = rank_of[layer][trace.experts[:, layer]]
        there = np.zeros((trace.num_tokens, num_ranks), np.bool_)
        there[tokens[:, None], ranks] = True
        reached = there.sum(axis=1)
        span += int(reached.sum())
        alltoall += int((reached - there[tokens, home]).sum())
        coherent += int((2 * reached - 1 - there[tokens, moving]).sum())
        moving = ranks[:, 0]
        if before is not None:
            cross += int((before[:, :, None] != ranks[:, None, :]).sum())
            pairs += ranks.shape[0] * ranks.shape[1] ** 2
        before = ranks
    total = trace.num_tokens * trace.num_layers
    return span / total, alltoall / total, coherent / total, cross / max(1, pairs)


def seconds(call: Callable[[], object]) -> list[float]:
    call()  # compile, touch memory
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def replicated(placement: Placement) -> Placement:
    """One more slot per rank and layer, holding the first expert of the next rank."""
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    table = placement.physical_to_logical.reshape(num_layers, num_ranks, -1)
    more = np.roll(table[:, :, :1], -1, axis=1)
    wide = np.concatenate([table, more], axis=2).reshape(num_layers, -1)
    return Placement(wide, placement.num_experts, num_ranks, placement.ranks_per_node)


def price(trace: Trace, placement: Placement) -> object:
    """Modelled step times of all batches, on all cores."""
    cluster = load_cluster(
        "h100-nvl8", num_nodes=placement.num_nodes, ranks_per_node=placement.ranks_per_node
    )
    dims = ModelDims("m", 7168, 44_000_000, 8.8e7)
    return step_time(trace, placement, cluster, dims=dims, mixed_batches=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", help="an interchange trace (.npz)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    traces = (
        {options.trace: read(options.trace)}
        if options.trace
        else {
            "24 layers, top 4 of 32": made_up(131_072, 24, 32, 4),
            "58 layers, top 8 of 256": made_up(16_384, 58, 256, 8),
        }
    )
    cold = float(
        subprocess.run([sys.executable, "-c", COLD], capture_output=True, check=True).stdout
    )
    rows = []
    for name, trace in traces.items():
        for num_ranks in (8, 32):
            slots = -(-trace.num_experts // num_ranks)
            if slots * num_ranks != trace.num_experts or num_ranks > trace.num_experts:
                continue
            one = contiguous(trace.num_layers, trace.num_experts, num_ranks, slots, 8)
            two = replicated(one)
            expected = plain_numpy(trace, one)
            found = measure(replay(trace, one, mixed_batches=False), num_resamples=0).values
            names = (
                "span", "messages_alltoall", "messages_coherent", "cross_rank_fraction"
            )  # fmt: skip
            assert np.allclose([found[key] for key in names], expected, rtol=1e-12)
            routings = trace.num_tokens * trace.num_layers
            row: dict[str, object] = {"trace": name, "ranks": num_ranks}
            calls: dict[str, Callable[[], object]] = {
                "numpy": lambda: plain_numpy(trace, one),  # noqa: B023
                "replay": lambda: replay(trace, one, mixed_batches=False),  # noqa: B023
                "with mixed batches": lambda: replay(trace, one),  # noqa: B023
                "local replicas": lambda: replay(trace, two, mixed_batches=False),  # noqa: B023
                "priced": lambda: price(trace, one),  # noqa: B023
                "priced, replicas": lambda: price(trace, two),  # noqa: B023
            }
            for label, call in calls.items():
                times = seconds(call)
                row[label] = routings / statistics.median(times) / 1e6
                row[f"{label} spread"] = [routings / t / 1e6 for t in (max(times), min(times))]
            row["ratio to numpy"] = row["replay"] / row["numpy"]  # type: ignore[operator]
            rows.append(row)
    result = {"unit": "million token-layers per second", "first call s": cold, "rows": rows}
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"first call in a new process, imports included: {cold:.2f} s")
    print(f"{result['unit']}, median of {REPEATS} (slowest .. fastest)")
    for row in rows:
        print(f"\n{row['trace']}, {row['ranks']} ranks")
        for label in LABELS:
            low, high = row[f"{label} spread"]  # type: ignore[misc]
            print(f"  {label:20s} {row[label]:6.1f}  ({low:.1f} .. {high:.1f})")
        print(f"  replay / numpy       {row['ratio to numpy']:6.1f} x")


if __name__ == "__main__":
    main()

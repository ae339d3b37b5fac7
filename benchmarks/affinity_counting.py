"""How fast traces are counted: python benchmarks/affinity_counting.py [--json] [--trace PATH]

Everything is measured in one run, on as many threads as there are cores, best of several repeats
(numpy's ways use one thread; ratios compare rates per core-second):

- `placer.affinity.count`, from a trace in memory to the finished tables;
- the same co-activation and affinity tables by numpy.bincount and by numpy.add.at (on fewer tokens;
  they leave out the primary-expert tables that placer counts along);
- the bound: adding one at addresses that are already known, read from a list in cache, to a table
  of E x E. No way of counting pair by pair can be faster on that core.

Two conventions. "pairs" follows the definition of the tables: K*K ordered pairs per token and layer
(co-activation) and K*K per token and two consecutive layers (affinity). "tallies" are the additions
that placer executes: a co-activation and its mirror image are one, and the primary-expert tables
count: K(K+1)/2 per token and layer, K*K + K + 1 per token and two layers.

Rates per second of wall-clock time suffer from other programs on the machine; the rate per
core-second (processor time of this program) does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numba
import numpy as np

from placer.affinity import count
from placer.trace import Trace, make_trace, open_trace

REPEATS = 5
SHAPES = {
    "24 x 32 top-4 (GPT-OSS-20B)": (24, 32, 4, 150_000),
    "26 x 64 top-6 (DeepSeek-V2-Lite)": (26, 64, 6, 60_000),
    "48 x 128 top-8 (Qwen3-30B-A3B)": (48, 128, 8, 30_000),
    "58 x 256 top-8 (DeepSeek-V3)": (58, 256, 8, 30_000),
}


def skewed_trace(num_layers: int, num_experts: int, top_k: int, num_tokens: int) -> Trace:
    """Tokens drawn with replacement from 4000 whose hottest experts carry some 3 times the mean."""
    rng = np.random.default_rng(0)
    noise = rng.gumbel(size=(4000, num_layers, num_experts)).astype(np.float32)
    popularity = -0.6 * np.log(np.arange(1, num_experts + 1))
    noise += rng.permuted(np.tile(popularity, (num_layers, 1)), axis=1).astype(np.float32)
    chosen = np.argpartition(-noise, top_k - 1, axis=2)[:, :, :top_k]
    experts = chosen.astype(np.int16)[rng.integers(0, len(chosen), num_tokens)]
    return make_trace(experts=experts, num_experts=num_experts)


def best(function: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Shortest wall-clock seconds and processor seconds of several calls, after one to warm up."""
    function()
    wall, core = [], []
    for _ in range(repeats):
        start, start_core = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start)
        core.append(time.process_time() - start_core)
    return min(wall), min(core)


def pair_addresses(trace: Trace, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses in tables of E*E of the co-activations and of the affinity of a layer."""
    here = trace.experts[:, layer].astype(np.int64)
    after = trace.experts[:, layer + 1].astype(np.int64) if layer + 1 < trace.num_layers else None
    row = here[:, :, None] * trace.num_experts
    inside = (row + here[:, None, :]).ravel()
    return inside, (row + after[:, None, :]).ravel() if after is not None else inside[:0]


def count_with_bincount(trace: Trace) -> None:
    size = trace.num_experts**2
    for layer in range(trace.num_layers):
        for addresses in pair_addresses(trace, layer):
            np.bincount(addresses, minlength=size)


def count_with_add_at(trace: Trace) -> None:
    for layer in range(trace.num_layers):
        for addresses in pair_addresses(trace, layer):
            np.add.at(np.zeros(trace.num_experts**2, np.uint32), addresses, np.uint32(1))


@numba.njit("void(uint32[::1], uint32[::1], int64)", nogil=True)
def scatter(table, addresses, rounds):
    for _ in range(rounds):
        for address in addresses:
            table[address] += np.uint32(1)


def scatter_bound(trace: Trace, threads: int) -> tuple[float, float]:
    """Additions per second on all threads, and per core-second, at known addresses in cache."""
    inside, between = pair_addresses(trace, 0)
    addresses = np.concatenate([inside[:8192], between[:8192]]).astype(np.uint32)
    rounds = 20_000_000 // addresses.size
    tables = [np.zeros(trace.num_experts**2, np.uint32) for _ in range(threads)]

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda table: scatter(table, addresses, rounds), tables))

    wall, core = best(run)
    additions = rounds * addresses.size * threads
    return additions / wall, additions / core


def measure(trace: Trace, threads: int) -> dict[str, Any]:
    layers, k = trace.num_layers, trace.top_k
    pairs = trace.num_tokens * k * k * (2 * layers - 1)
    tallies = trace.num_tokens * (layers * k * (k + 1) // 2 + (layers - 1) * (k * k + k + 1))
    wall, core = best(lambda: count(trace, threads=threads))
    few = trace.select(np.arange(trace.num_tokens) < 3000)
    few_pairs = few.num_tokens * k * k * (2 * layers - 1)
    bincount_wall, bincount_core = best(lambda: count_with_bincount(few), 3)
    add_at_wall, add_at_core = best(lambda: count_with_add_at(few), 3)
    bound, bound_core = scatter_bound(few, threads)
    return {
        "tokens": trace.num_tokens,
        "pairs_per_s": pairs / wall,
        "tallies_per_s": tallies / wall,
        "pairs_per_core_s": pairs / core,
        "tallies_per_core_s": tallies / core,
        "bincount_pairs_per_s": few_pairs / bincount_wall,
        "bincount_pairs_per_core_s": few_pairs / bincount_core,
        "add_at_pairs_per_s": few_pairs / add_at_wall,
        "add_at_pairs_per_core_s": few_pairs / add_at_core,
        "times_bincount_per_core": pairs / core / (few_pairs / bincount_core),
        "times_add_at_per_core": pairs / core / (few_pairs / add_at_core),
        "bound_tallies_per_s": bound,
        "bound_tallies_per_core_s": bound_core,
        "share_of_bound": tallies / core / bound_core,
    }


def first_call() -> dict[str, float]:
    """Seconds of the first count in a new process: nothing compiled yet, and compiled before."""
    script = (
        "import time, numpy as np\n"
        "from placer.affinity import count\n"
        "from placer.trace import make_trace\n"
        "trace = make_trace(experts=np.zeros((1, 2, 1), int), num_experts=1)\n"
        "start = time.perf_counter()\n"
        "count(trace)\n"
        "print(time.perf_counter() - start)\n"
    )
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("nothing compiled", "compiled before"):
            run = subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, "NUMBA_CACHE_DIR": cache},
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds[name] = float(run.stdout)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--trace", type=Path, help="also count this trace")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "numba": numba.__version__,
        "numpy": np.__version__,
        "first_call_s": first_call(),
        "shapes": {},
    }
    traces = {name: lambda s=shape: skewed_trace(*s) for name, shape in SHAPES.items()}
    if options.trace:
        traces[options.trace.name] = lambda: open_trace(options.trace).read()
    if not options.json:
        cold, warm = results["first_call_s"].values()
        print(f"{options.threads} threads; first count {cold:.2f} s, compiled before {warm:.2f} s")
        print("million per second (per core-second); bound in tallies; ratios per core-second")
        print(
            f"{'shape':34}{'pairs':>14}{'tallies':>14}{'bincount':>12}{'add.at':>12}"
            f"{'x bincount':>12}{'x add.at':>10}{'bound':>14}{'of bound':>10}"
        )
    for name, make in traces.items():
        row = measure(make(), options.threads)
        results["shapes"][name] = row
        if not options.json:
            print(
                f"{name:34}"
                f"{_two(row, 'pairs'):>14}{_two(row, 'tallies'):>14}"
                f"{_two(row, 'bincount_pairs'):>12}{_two(row, 'add_at_pairs'):>12}"
                f"{row['times_bincount_per_core']:12.1f}{row['times_add_at_per_core']:10.1f}"
                f"{_two(row, 'bound_tallies'):>14}"
                f"{row['share_of_bound']:10.0%}"
            )
    if options.json:
        print(json.dumps(results, indent=1))


def _two(row: dict[str, Any], what: str) -> str:
    return f"{row[f'{what}_per_s'] / 1e6:.0f} ({row[f'{what}_per_core_s'] / 1e6:.0f})"


if __name__ == "__main__":
    main()

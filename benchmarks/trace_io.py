"""How fast traces are checked, written and read, and how large they are.

    python benchmarks/trace_io.py [--trace FILE.npz] [--json]

Each figure is the best of several repeats in this run. Rates are millions of expert ids per second
of this process's processor time (`M ids/cpu-s`, all its threads together), which other programs on
the machine disturb less than wall-clock time (`M ids/s`). Reading verifies page checksums and
checks every id; files are read from the page cache. Made-up traces draw every token afresh
(Gumbel top-k over a skewed popularity), so nothing repeats that a compressor could find.

What it is compared with: np.savez_compressed of the same ids as int16, and the raw int16 array.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow

from placer.trace import Trace, TraceSource, TraceWriter, make_trace, open_trace

REPEATS = 3
SHAPES = {
    "24 x 32 top-4 (GPT-OSS-20B)": (24, 32, 4, 65536),
    "58 x 256 top-8 (DeepSeek-V3)": (58, 256, 8, 32768),
}


def made_up_trace(num_layers: int, num_experts: int, top_k: int, num_tokens: int) -> Trace:
    """Independent tokens with softmax-like gate weights, rounded to bfloat16 as routers give."""
    rng = np.random.default_rng(0)
    popularity = rng.normal(size=(num_layers, num_experts)).astype(np.float32)
    experts = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        for start in range(0, num_tokens, 8192):
            uniform = rng.random((min(8192, num_tokens - start), num_experts), np.float32)
            scores = popularity[layer] - np.log(-np.log(np.maximum(uniform, 1e-30)))
            experts[start : start + 8192, layer] = np.argpartition(-scores, top_k - 1)[:, :top_k]
    weights = rng.random(experts.shape, np.float32)
    weights /= weights.sum(axis=2, keepdims=True)
    weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    request = np.arange(num_tokens) // 512
    return make_trace(
        experts=experts,
        num_experts=num_experts,
        weights=weights,
        request=request,
        phase=np.arange(num_tokens) % 512 >= 128,
        step=np.arange(num_tokens) // 64,
    )


def best(action: Callable[[int], object]) -> tuple[float, float]:
    """Least wall-clock and processor seconds; `action` gets the number of the repeat."""
    times = []
    for repeat in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        action(repeat)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def batches(trace: Trace, size: int, with_weights: bool) -> Iterator[dict[str, Any]]:
    """Arguments of `TraceWriter.append`, `size` tokens at a time."""
    for start in range(0, trace.num_tokens, size):
        here = slice(start, start + size)
        arguments: dict[str, Any] = {
            "experts": trace.experts[here],
            "request": trace.request[here],
            "position": trace.position[here],
            "phase": trace.phase[here],
        }
        if trace.step is not None:
            arguments["step"] = trace.step[here]
        if with_weights:
            assert trace.weights is not None
            arguments["weights"] = trace.weights[here]
        yield arguments


def write(trace: Trace, path: Path, size: int, with_weights: bool) -> None:
    with TraceWriter(
        path,
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        top_k=trace.top_k,
        weights=with_weights,
        step=trace.step is not None,
    ) as writer:
        for arguments in batches(trace, size, with_weights):
            writer.append(**arguments)


def read(source: TraceSource) -> None:
    assert sum(chunk.num_tokens for chunk in source.chunks()) == source.num_tokens


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def measure(trace: Trace, folder: Path) -> list[dict[str, Any]]:
    """All figures of one trace."""
    num_ids = trace.experts.size
    rows: list[dict[str, Any]] = []

    def add(what: str, action: Callable[[int], object], num_bytes: int | None = None) -> None:
        wall, cpu = best(action)
        rows.append(
            {
                "what": what,
                "ids_per_s": num_ids / wall,
                "ids_per_cpu_s": num_ids / cpu,
                "bytes_per_id": None if num_bytes is None else num_bytes / num_ids,
            }
        )

    add("make_trace", lambda _: make_trace(experts=trace.experts, num_experts=trace.num_experts))
    sizes = [(False, size) for size in (8, 64, 1024, trace.num_tokens)]
    if trace.weights is not None:
        sizes.append((True, trace.num_tokens))
    for with_weights, size in sizes:
        name = f"{'w' if with_weights else 'n'}{size}"
        kind = "ids and weights" if with_weights else "ids"
        add(
            f"TraceWriter, {kind}, {size} tokens a call",
            lambda i: write(trace, folder / f"{name}-{i}", size, with_weights),  # noqa: B023
        )
        rows[-1]["bytes_per_id"] = bytes_of(folder / f"{name}-0") / num_ids
        if size == trace.num_tokens:
            source = open_trace(folder / f"{name}-0")
            add(f"chunks, {kind}", lambda _: read(source))  # noqa: B023
            if not with_weights:
                add("fingerprint", lambda _: source.fingerprint())  # noqa: B023
    compressed = folder / "a.npz"
    add("np.savez_compressed, ids", lambda _: np.savez_compressed(compressed, e=trace.experts))
    rows[-1]["bytes_per_id"] = compressed.stat().st_size / num_ids
    add("np.load, ids", lambda _: np.load(compressed)["e"])
    rows.append({"what": "raw int16", "bytes_per_id": 2.0})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", type=Path, help="measure this .npz instead of made-up traces")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.trace is None:
        traces = {name: made_up_trace(*shape) for name, shape in SHAPES.items()}
    else:
        traces = {options.trace.name: open_trace(options.trace).read()}
    results = {}
    for name, trace in traces.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {"num_ids": trace.experts.size, "rows": measure(trace, Path(folder))}
    machine = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
        "cores": os.cpu_count(),
    }
    if options.json:
        print(json.dumps({"machine": machine, "results": results}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, result in results.items():
        print(f"\n{name}: {result['num_ids'] / 1e6:.1f} M ids")
        print(f"{'':46}{'M ids/s':>10}{'M ids/cpu-s':>13}{'bytes/id':>10}")
        for row in result["rows"]:
            rates = [
                f"{row[key] / 1e6:.0f}" if row.get(key) else ""
                for key in ("ids_per_s", "ids_per_cpu_s")
            ]
            size = f"{row['bytes_per_id']:.2f}" if row.get("bytes_per_id") else ""
            print(f"{row['what']:46}{rates[0]:>10}{rates[1]:>13}{size:>10}")


if __name__ == "__main__":
    main()

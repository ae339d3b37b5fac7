"""Predicted against measured: layers of several models under several plans, in real processes.

Calibrates a cluster for each model and number of ranks, predicts every case from it, runs it with
the runtime's own `alltoall` and experts, and prints both. Routing is that of the canned traces (8
layers x 32 experts, top-4); weights are random, since their values do not matter for time.

    python benchmarks/cost_model.py                     # 2 and 4 ranks, three models
    python benchmarks/cost_model.py --ranks 2 --models thin --json out.json

On a machine that others use as well, times mean nothing: run it on a quiet one, or with real-time
priority (`chrt -r 1 python ...`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from placer.cost import step_time
from placer.cost.order import concatenate, interleave
from placer.placement import Placement, contiguous
from placer.planning import Settings, make_plan
from placer.runtime.bank import Bank
from placer.runtime.calibrate import calibrate
from placer.runtime.context import RankContext
from placer.runtime.counters import Counters
from placer.runtime.dispatch.alltoall import alltoall
from placer.runtime.dispatch.common import Group
from placer.runtime.launch import launch
from placer.runtime.layout import read_layout
from placer.runtime.loading import local_slots
from placer.runtime.meeting import joined
from placer.runtime.rows import Tokens
from placer.runtime.serving import Serving
from placer.trace import Trace, open_trace
from placer.trace.model import ModelDims

ROOT = Path(__file__).resolve().parent.parent
TOKENS_PER_RANK = (4, 16, 64, 256)
CPU = torch.device("cpu")
# hidden size, size of an expert: experts that dominate, states that dominate
MODELS = {"shipped": None, "wide": (1024, 512), "thin": (4096, 32)}


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of one pass.

    Attributes:
        experts: [T, L, K].
        home: [T].
    """

    experts: np.ndarray
    home: np.ndarray


def run(
    context: RankContext, folder: Path, placements: list[Placement], batches: list[Batch],
    repeats: int,
) -> np.ndarray:  # fmt: skip
    """[repeats, placements x batches] seconds of all layers: dispatch + compute + combine."""
    layout = read_layout(folder, "float32")
    with joined(context, CPU) as transport, torch.inference_mode():
        passes = []
        for placement in placements:
            counters = Counters(placement.num_layers)
            banks = [random_bank(layout, placement, l, context.rank) for l in range(8)]  # noqa: E741
            group = Group(placement, transport, counters, banks)
            serving = Serving(placement, context.rank, CPU)
            for batch in batches:
                own = np.flatnonzero(batch.home == context.rank)
                tokens = []
                for layer in range(placement.num_layers):
                    chosen = torch.from_numpy(batch.experts[own, layer].astype(np.int64))
                    weights = torch.full(chosen.shape, 1 / chosen.shape[1])
                    slots = serving.slots(layer, chosen, weights).to(torch.int32)
                    states = torch.randn(len(own), layout.hidden_size)
                    tokens.append(Tokens(states, slots, weights))
                most = np.bincount(batch.home, minlength=context.num_ranks).tolist()
                passes.append((group, counters, tokens, most))
        found = np.zeros((repeats, len(passes)))
        for repeat in range(-1, repeats):  # the first one warms up
            for i in np.random.default_rng(repeat + 1).permutation(len(passes)):
                group, counters, tokens, most = passes[i]
                group.tokens_of_rank = most
                counters.reset()
                dist.barrier()
                for layer, given in enumerate(tokens):
                    alltoall(group, layer, given)
                if repeat >= 0:
                    found[repeat, i] = counters.seconds.sum()
    return found


def random_bank(layout: Any, placement: Placement, layer: int, rank: int) -> Bank:
    """A rank's experts of one layer with random weights."""
    module = copy.deepcopy(layout.model.get_submodule(layout.layers[layer].experts))
    count = len(local_slots(placement, layer, rank))
    for name, shape in layout.expert_parameters.items():
        held = torch.randn((count, *shape)) * 0.02
        setattr(module, name, nn.Parameter(held, requires_grad=False))
    module.num_experts = count
    return Bank(module, placement, layer, rank, CPU)


def model_folder(name: str, root: Path) -> Path:
    """A checkpoint's folder; of the made-up ones only the configuration exists."""
    shape = MODELS[name]
    if shape is None:
        return ROOT / "examples" / "model"
    hidden, expert = shape
    folder = root / name
    folder.mkdir()
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": expert,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plans_for(trace: Trace, num_ranks: int) -> dict[str, Placement]:
    """Placements that differ in traffic and balance."""
    plain = contiguous(8, 32, num_ranks, 32 // num_ranks, num_ranks)
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(32) for _ in range(8)])
    load = np.stack([np.bincount(trace.experts[:, l].reshape(-1), minlength=32) for l in range(8)])  # noqa: E741
    piled = np.argsort(-load, axis=1)  # the hottest experts together
    sources = [open_trace(ROOT / "traces" / "english")]
    solved = make_plan(sources, Settings(num_ranks=num_ranks, num_nodes=1)).placement
    spare = make_plan(
        sources, Settings(num_ranks=num_ranks, num_nodes=1, slots_per_rank=32 // num_ranks + 2)
    ).placement
    return {
        "contiguous": plain,
        "random": Placement(shuffled, 32, num_ranks, num_ranks),
        "piled": Placement(piled, 32, num_ranks, num_ranks),
        "solved": solved,
        "replicas": spare,
    }


def cases_of(name: str, num_ranks: int, trace: Trace, repeats: int, root: Path) -> dict[str, Any]:
    """Calibrate, predict, measure."""
    folder = model_folder(name, root)
    calibration = calibrate(folder, num_ranks, dtype="float32", repeats=repeats)
    assert calibration is not None
    layout = read_layout(folder, "float32")
    weights = sum(int(np.prod(s)) for s in layout.expert_parameters.values() if len(s) > 1)
    dims = ModelDims(name, layout.hidden_size, layout.expert_bytes, 2.0 * weights)
    plans = plans_for(trace, num_ranks)
    home = trace.request % num_ranks
    batches, predicted = [], []
    for tokens in TOKENS_PER_RANK:
        chosen = [np.flatnonzero(home == rank)[:tokens] for rank in range(num_ranks)]
        part = trace.select(np.concatenate(chosen))
        batches.append((part, Batch(np.asarray(part.experts), part.request % num_ranks)))
    for placement in plans.values():
        for part, _ in batches:
            found = step_time(
                part, placement, calibration.cluster, dims=dims, batch_tokens=part.num_tokens,
                mixed_batches=False,
            )  # fmt: skip
            assert found.total_us is not None
            predicted.append(float(found.total_us[0]))
    given = (folder, list(plans.values()), [batch for _, batch in batches], repeats)
    times = np.stack(launch(run, num_ranks, given)).mean(axis=0)
    measured = np.median(times, axis=0) * 1e6
    names = itertools.product(plans, TOKENS_PER_RANK)
    return {
        "model": name,
        "ranks": num_ranks,
        "fit": calibration.summary(),
        "cases": [
            {"plan": plan, "tokens_per_rank": tokens, "predicted_us": p, "measured_us": float(m)}
            for (plan, tokens), p, m in zip(names, predicted, measured, strict=True)
        ],
    }


def order_of(cases: list[dict[str, Any]], margin: float = 0.05) -> tuple[int, int]:
    """Pairs of plans that differ as predicted, and those predicted to, by more than the margin."""
    right = total = 0
    for tokens in TOKENS_PER_RANK:
        rows = [case for case in cases if case["tokens_per_rank"] == tokens]
        for one, other in itertools.combinations(rows, 2):
            slow, fast = sorted((one, other), key=lambda row: -row["predicted_us"])
            if slow["predicted_us"] > (1 + margin) * fast["predicted_us"]:
                total += 1
                right += slow["measured_us"] > fast["measured_us"]
    return right, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trace = interleave(concatenate(list(open_trace(ROOT / "traces" / "english").chunks())))
    results = []
    with tempfile.TemporaryDirectory() as root:
        for name, num_ranks in itertools.product(arguments.models, arguments.ranks):
            with tempfile.TemporaryDirectory(dir=root) as own:
                result = cases_of(name, num_ranks, trace, arguments.repeats, Path(own))
            results.append(result)
            report(result)
    errors = [error_of(case) for result in results for case in result["cases"]]
    print(f"\nall: median error {np.median(errors):.1%}, 90th {np.quantile(errors, 0.9):.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def error_of(case: dict[str, Any]) -> float:
    return float(abs(case["predicted_us"] / case["measured_us"] - 1))


def report(result: dict[str, Any]) -> None:
    cases = result["cases"]
    errors = [error_of(case) for case in cases]
    right, total = order_of(cases)
    print(
        f"\n{result['model']}, {result['ranks']} ranks: median error {np.median(errors):.1%}, "
        f"90th {np.quantile(errors, 0.9):.1%}; plans predicted to differ by > 5 %: order right in "
        f"{right} of {total} pairs"
    )
    print(f"{'tokens per rank':16}" + "".join(f"{tokens:>24}" for tokens in TOKENS_PER_RANK))
    for plan in dict.fromkeys(case["plan"] for case in cases):
        row = [case for case in cases if case["plan"] == plan]
        cells = [f"{c['predicted_us'] / 1e3:9.2f} / {c['measured_us'] / 1e3:9.2f} ms" for c in row]
        print(f"{plan:16}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()

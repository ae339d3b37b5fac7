"""Gaps that are proven for affinity, co-activation, span and messages, and what the proofs cost.

    python benchmarks/certificates.py [--trace gpt_oss.npz] [--effort 120] [--large]
    python benchmarks/certificates.py --trace gpt_oss.npz --traffic [--gpus 8] [--effort 60]
        [--slots-per-rank 5] [--caps none,1.10]

Instances, all in-sample (a certificate is about the very data that it is computed on):

- `topics`: synthetic, 26 layers x 64 experts top-6. A token's hidden vector drifts from layer to
  layer; experts are random directions with a popularity. 0.5 bits of mutual information between the
  experts of consecutive layers, hottest expert 2.4 times the mean.
- `random`: the same shape without any structure: a control.
- with --trace, one of a model with 32 experts top-4 (GPT-OSS-20B): `trace` as it is; `primary`, the
  flow between first experts only; `paired`, a stand-in for a model of 26 x 64 top-6: layers l and
  l + 12 side by side, three experts of a token from each.
- with --traffic: span and messages of plans for half of the trace's requests, under caps on
  imbalance.
- with --large: `topics` of 58 layers x 256 experts top-8.

A proof may take --effort nominal seconds: 120 is what 60 s on two free cores are. It ends before
where the bound no longer improves.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import solvers
from solvers.bounds.certifying import certify

FIGURES = {"affinity": "cross_rank_fraction", "coactivation": "coactivation_cut"}


def count(experts: NDArray[np.int64], num_experts: int, num_ranks: int) -> solvers.Problem:
    """The problem of tokens [T, L, K] that all use K experts; it keeps only the counts."""
    num_tokens, num_layers, width = experts.shape
    used = np.zeros((num_layers, num_tokens, num_experts), np.float32)
    for layer in range(num_layers):
        used[layer, np.arange(num_tokens)[:, None], experts[:, layer]] = 1
    flow = [used[i].T @ used[i + 1] for i in range(num_layers - 1)]
    return solvers.Problem(
        load=used.sum(axis=1, dtype=np.float64),
        num_ranks=num_ranks,
        slots_per_rank=num_experts // num_ranks,
        ranks_per_node=num_ranks,
        coactivation=np.stack([rows.T @ rows for rows in used]).astype(np.float64),
        affinity=np.stack(flow).astype(np.float64) / width**2,
    )


def topics(
    num_layers: int, num_experts: int, width: int, num_tokens: int, seed: int = 1
) -> NDArray[np.int64]:
    """[T, L, K] experts of tokens whose hidden vectors drift."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((num_tokens, 8))
    experts = np.empty((num_tokens, num_layers, width), np.int64)
    for layer in range(num_layers):
        directions = rng.standard_normal((8, num_experts)) / np.sqrt(8)
        popularity = 0.5 * rng.standard_normal(num_experts)
        score = 4.5 * hidden @ directions + popularity
        score += rng.gumbel(size=score.shape)
        experts[:, layer] = np.argpartition(-score, width, axis=1)[:, :width]
        hidden = 0.97 * hidden + np.sqrt(1 - 0.97**2) * rng.standard_normal(hidden.shape)
    return experts


def first_experts(experts: NDArray[np.int64], num_experts: int, num_ranks: int) -> solvers.Problem:
    """Affinity of first experts only."""
    problem = count(experts, num_experts, num_ranks)
    return replace(problem, affinity=count(experts[:, :, :1], num_experts, num_ranks).affinity)


def instances(trace: Path | None, large: bool) -> dict[str, solvers.Problem]:
    """Problems by name."""
    rng = np.random.default_rng(0)
    found = {
        "topics 26x64, 8 ranks": count(topics(26, 64, 6, 40_000), 64, 8),
        "random 26x64, 8 ranks": count(
            np.argsort(rng.random((20_000, 26, 64)), axis=2)[:, :, :6], 64, 8
        ),
    }
    if trace is not None:
        arrays = np.load(trace)
        requests = np.unique(arrays["request"])
        fitted = rng.permutation(requests)[: requests.size // 2]
        experts = arrays["experts"][np.isin(arrays["request"], fitted)].astype(np.int64)
        here, there = np.arange(26) % 24, (np.arange(26) + 12) % 24
        paired = np.concatenate([experts[:, here, :3], experts[:, there, :3] + 32], axis=2)
        for ranks in (4, 8):
            found[f"trace 24x32, {ranks} ranks"] = count(experts, 32, ranks)
        found["primary 24x32, 8 ranks"] = first_experts(experts, 32, 8)
        found["paired 26x64, 8 ranks"] = count(paired, 64, 8)
        found["paired primary 26x64, 8 ranks"] = first_experts(paired, 64, 8)
    if large:
        found["topics 58x256, 32 ranks"] = count(topics(58, 256, 8, 30_000), 256, 32)
    return found


def measure_traffic(
    trace: Path, num_ranks: int, slots: int | None, caps: list[float | None], effort: float
) -> None:
    """A table of what is proven about plans under caps."""
    from placer.planning import Settings, build_problem, open_traces, split_sources

    settings = Settings(num_ranks=num_ranks, slots_per_rank=slots)
    fit = split_sources(open_traces([trace]), settings).fit
    problem = build_problem(fit, settings, lambda _: None)
    print("| cap | figure | value | bound | gap | CPU s | by |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cap in caps:
        asked = replace(problem, max_imbalance=cap)
        result = solvers.solve(asked, "local_search")
        for figure in ("span", "messages_alltoall"):
            start = time.process_time()
            (bound,) = certify(asked, result.placement, solvers.Budget(effort=effort), [figure])
            print(
                f"| {cap or 'none'} | {figure} | {bound.value:.4f} | {bound.lower_bound:.4f} "
                f"| {100 * bound.gap:.1f} % | {time.process_time() - start:.0f} | {bound.method} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--effort", type=float, default=120.0, help="CPU seconds per proof")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--traffic", action="store_true", help="span and messages; needs --trace")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--slots-per-rank", type=int, help="with --traffic")
    parser.add_argument("--caps", default="none,1.3,1.1,1.05", help="with --traffic")
    arguments = parser.parse_args()
    if arguments.traffic:
        caps = [None if cap == "none" else float(cap) for cap in arguments.caps.split(",")]
        measure_traffic(
            arguments.trace, arguments.gpus, arguments.slots_per_rank, caps, arguments.effort
        )
        return
    solvers.solve(count(topics(2, 8, 2, 50), 8, 2), "pairwise")  # compiles
    print("| instance | objective | value | solve, CPU s | bound | gap | proof, s (CPU s) | by |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, problem in instances(arguments.trace, arguments.large).items():
        for objective, figure in FIGURES.items():
            if arguments.only not in name or ("primary" in name and objective != "affinity"):
                continue
            asked = replace(problem, objective=objective)  # type: ignore[arg-type]
            start = time.process_time()
            result = solvers.solve(asked, "pairwise")
            middle, wall = time.process_time(), time.perf_counter()
            (bound,) = certify(
                asked, result.placement, solvers.Budget(effort=arguments.effort), [figure]
            )
            print(
                f"| {name} | {objective} | {bound.value:.4f} | {middle - start:.1f} "
                f"| {bound.lower_bound:.4f} | {100 * bound.gap:.2f} % "
                f"| {time.perf_counter() - wall:.1f} ({time.process_time() - middle:.1f}) "
                f"| {bound.method} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

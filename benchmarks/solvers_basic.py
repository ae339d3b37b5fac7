"""Every solver on one trace: fitted to half of the requests, judged on the other half.

    python benchmarks/solvers_basic.py trace.npz --ranks 4 8 --spare 0 1 --solvers eplb,exflow

Messages per token and layer (home rank = request mod G), imbalance, cross-rank fraction: held-out,
means over the seeds, each of which splits the requests anew. Seconds, gap: of fitting.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import solvers
from solvers.check import check

FIGURES = ("messages_alltoall", "messages_coherent", "imbalance", "cross_rank_fraction")


def problem_of(
    experts: NDArray[np.integer],
    request: NDArray[np.int64],
    num_experts: int,
    num_ranks: int,
    spare: int,
    dispatch: solvers.problem.Dispatch,
    max_imbalance: float | None,
) -> solvers.Problem:
    """The problem of tokens [T, L, K] that all use K experts."""
    _, num_layers, width = experts.shape
    ids = experts.astype(np.int64)
    load = np.stack(
        [np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(num_layers)]
    )

    def pairs(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        key = (first[:, :, None] * num_experts + second[:, None, :]).ravel()
        counts = np.bincount(key, minlength=num_experts**2)
        return counts.reshape(num_experts, num_experts).astype(np.float64)

    return solvers.Problem(
        load=load.astype(np.float64),
        num_ranks=num_ranks,
        slots_per_rank=-(-num_experts // num_ranks) + spare,
        ranks_per_node=num_ranks,
        coactivation=np.stack([pairs(ids[:, i], ids[:, i]) for i in range(num_layers)]),
        affinity=np.stack(
            [pairs(ids[:, i], ids[:, i + 1]) / width**2 for i in range(num_layers - 1)]
        ),
        tokens=experts,
        home=request % num_ranks,
        dispatch=dispatch,
        max_imbalance=max_imbalance,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="interchange trace, all tokens with k experts")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument(
        "--spare", type=int, nargs="+", default=[0], help="redundant slots per rank"
    )
    parser.add_argument("--solvers", help="comma-separated; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="of each half")
    parser.add_argument("--dispatch", choices=["alltoall", "coherent"], default="alltoall")
    parser.add_argument("--max-imbalance", type=float)
    options = parser.parse_args()
    with np.load(options.trace) as trace:
        experts, request = trace["experts"], trace["request"].astype(np.int64)
        num_experts = int(trace["num_experts"])
    names = options.solvers.split(",") if options.solvers else solvers.names()
    print(f"{'':36}" + "".join(f"{name:>20}" for name in FIGURES) + f"{'seconds':>9}{'gap':>8}")
    for num_ranks in options.ranks:
        for spare in options.spare:
            for name in names:
                rows, seconds, gaps = [], [], []
                for seed in range(options.seeds):
                    rng = np.random.default_rng(seed)
                    requests = rng.permutation(np.unique(request))
                    train = np.isin(request, requests[: requests.size // 2])
                    halves = []
                    for half in (train, ~train):
                        chosen = rng.permutation(np.nonzero(half)[0])[: options.tokens]
                        chosen.sort()
                        halves.append(
                            problem_of(
                                experts[chosen],
                                request[chosen],
                                num_experts,
                                num_ranks,
                                spare,
                                options.dispatch,
                                options.max_imbalance,
                            )
                        )
                    start = time.perf_counter()
                    result = solvers.solve(halves[0], name, seed=seed)
                    seconds.append(min(result.seconds, time.perf_counter() - start))
                    gaps.append(np.nan if result.gap is None else result.gap)
                    parts = check(halves[1], result.placement)
                    rows.append([parts[figure] for figure in FIGURES])
                print(
                    f"{num_ranks:3} ranks, {spare} spare, {name:18}"
                    + "".join(f"{value:20.3f}" for value in np.mean(rows, axis=0))
                    + f"{np.mean(seconds):9.2f}{np.mean(gaps):8.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""How long a plan takes for models of hundreds of experts, and what more time would bring.

    python benchmarks/scale.py                       # 58 x 256 top-8 on 32 ranks
    python benchmarks/scale.py --layers 94 --experts 128 --gpus 16 --slots-per-rank 8

A synthetic trace (benchmarks/synthetic.py) is solved as `placer solve` does, and again with RATIO
times the proposals: the printed excess is that of the first over the second. Times are processor
seconds and, where the machine is shared, say more than the wall clock's.
"""

from __future__ import annotations

import argparse
import resource
import time

from synthetic import synthetic_trace

import solvers
from placer.planning import Settings, build_problem
from placer.trace import MemorySource
from solvers import layers as solver_layers

RATIO = 4


def main() -> None:
    """Solve twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--slots-per-rank", type=int)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--max-imbalance", type=float, default=1.10)
    parser.add_argument("--time-limit", type=float)
    parser.add_argument("--once", action="store_true", help="do not solve again for longer")
    arguments = parser.parse_args()
    trace = synthetic_trace(
        num_layers=arguments.layers,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        num_tokens=arguments.tokens,
    )
    settings = Settings(
        num_ranks=arguments.gpus,
        num_nodes=arguments.nodes,
        slots_per_rank=arguments.slots_per_rank,
        max_imbalance=arguments.max_imbalance,
    )
    start = time.process_time()
    problem = build_problem(MemorySource(trace), settings, lambda _: None)
    counting = time.process_time() - start
    del trace
    found = []
    for ratio in (1,) if arguments.once else (1, RATIO):
        solver_layers.EFFORT = ratio
        start, wall = time.process_time(), time.perf_counter()
        solution = solvers.get("local_search").function(
            problem, 0, solvers.Budget(arguments.time_limit)
        )
        spent, waited = time.process_time() - start, time.perf_counter() - wall
        parts = solvers.check.check(problem, solution.placement)
        value = solvers.check.objective(problem, parts)
        found.append(value)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{ratio} x effort: traffic {value:.4f}, imbalance "
            f"{solvers.capped_imbalance(parts):.3f}, {spent:.0f} s of processor ({waited:.0f} s), "
            f"counting {counting:.0f} s, peak {peak:.2f} GB",
            flush=True,
        )
    if len(found) > 1:
        print(f"{100 * (found[0] / found[1] - 1):+.2f} % against {RATIO} x effort")


if __name__ == "__main__":
    main()

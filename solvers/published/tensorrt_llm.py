"""TensorRT-LLM's placement: greedy by load, and a script's variant that looks at co-occurrence.

`tensorrt_llm`, for one layer (doReplication, doPlacement):

1. Every spare slot goes, one by one, to the expert whose copies carry most, w_e / c_e; of equal
   ones to the one with the higher number.
2. Copies, heaviest first and of equal ones the lower expert number first, go to the least loaded
   rank with a free slot.

`tensorrt_llm_cooccurrence` keeps step 1 and fills ranks in two stages
(`do_placement_with_cooccurrence`); C_ij counts the tokens that chose both i and j:

2. Rank by rank: start with the heaviest copy left, then add the copy left with the largest
   sum of C_ij over the experts i of the rank, as long as the rank fills at most alpha of its slots
   and of the mean rank load; alpha = 0.8.
3. Copies left over, heaviest first, go to the least loaded rank with a free slot.

Differences from the original: no more copies of an expert than ranks, and doubles on a rank are
parted (`solvers.packing.part_doubles`). The original's greedy differs from EPLB's global policy
in ties only.

Complexity: O(L S (log S + G)), with co-occurrence O(L S E). Guarantee: none.

Source: TensorRT-LLM, cpp/tensorrt_llm/runtime/moeLoadBalancer/moeLoadBalancer.cpp;
examples/wide_ep/ep_load_balancer/generate_eplb_config_cooccurrence.py and utils.py (2025; later
releases dropped the script).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.budget import Budget
from solvers.packing import part_doubles
from solvers.problem import Problem
from solvers.registry import register
from solvers.result import Solution

ALPHA = 0.8


@register("tensorrt_llm", source="TensorRT-LLM moeLoadBalancer.cpp", replicates=True)
def tensorrt_llm(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Balance load with redundant experts, greedily, over all ranks."""
    placement = np.empty((problem.num_layers, problem.num_slots), np.int64)
    num_doubles = 0
    for layer, load in enumerate(problem.load):
        copies = count_copies(load, problem.num_slots, problem.num_ranks)
        table = np.full((problem.num_ranks, problem.slots_per_rank), -1, np.int64)
        _deal(table, copies, load / copies)
        num_doubles += part_doubles(table, load / copies)
        placement[layer] = table.ravel()
    return Solution(placement, notes={"doubles_parted": num_doubles})


@register(
    "tensorrt_llm_cooccurrence",
    source="TensorRT-LLM generate_eplb_config_cooccurrence.py",
    needs=("coactivation",),
    replicates=True,
)
def tensorrt_llm_cooccurrence(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Collect co-activated experts on each rank up to 0.8 of its share, then balance load."""
    assert problem.coactivation is not None
    placement = np.empty((problem.num_layers, problem.num_slots), np.int64)
    num_doubles = 0
    for layer, load in enumerate(problem.load):
        copies = count_copies(load, problem.num_slots, problem.num_ranks)
        table = np.full((problem.num_ranks, problem.slots_per_rank), -1, np.int64)
        left = _collect(table, copies, load / copies, problem.coactivation[layer])
        _deal(table, left, load / copies)
        num_doubles += part_doubles(table, load / copies)
        placement[layer] = table.ravel()
    return Solution(placement, notes={"alpha": ALPHA, "doubles_parted": num_doubles})


def count_copies(load: NDArray[np.float64], num_slots: int, max_copies: int) -> NDArray[np.int64]:
    """[E] copies of each expert; spread evenly where there is no load at all."""
    num_copies = min(num_slots, load.size * max_copies)
    if not load.any():
        return num_copies // load.size + (np.arange(load.size) < num_copies % load.size)
    copies = np.ones(load.size, np.int64)
    for _ in range(num_copies - load.size):
        share = np.where(copies < max_copies, load / copies, -1.0)
        copies[load.size - 1 - int(share[::-1].argmax())] += 1
    return copies


def _collect(
    table: NDArray[np.int64],
    copies: NDArray[np.int64],
    share: NDArray[np.float64],
    together: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Stage 2: fill the ranks of `table` [G, slots] in place; [E] copies left over."""
    num_ranks, num_slots = table.shape
    left = copies.copy()
    most_load = ALPHA * float(share @ copies) / num_ranks
    apart = together.copy()
    np.fill_diagonal(apart, -1e9)  # no second copy of an expert before every other expert
    for row in table:
        worth = share
        load, held = 0.0, 0
        while held + 1 <= ALPHA * num_slots and left.any():
            expert = int(np.where(left > 0, worth, -np.inf).argmax())
            if load + share[expert] > most_load:
                break
            row[held] = expert
            held += 1
            load += share[expert]
            left[expert] -= 1
            worth = apart[row[:held]].sum(axis=0)
    return left


def _deal(table: NDArray[np.int64], left: NDArray[np.int64], share: NDArray[np.float64]) -> None:
    """The copies left [E], heaviest first, into `table` [G, slots]: the least loaded rank."""
    load = np.where(table >= 0, share[table], 0.0).sum(axis=1)
    held = (table >= 0).sum(axis=1)
    load[held == table.shape[1]] = np.inf
    for expert in np.repeat(
        np.argsort(-share, kind="stable"), left[np.argsort(-share, kind="stable")]
    ):
        rank = int(load.argmin())
        table[rank, held[rank]] = expert
        held[rank] += 1
        load[rank] = np.inf if held[rank] == table.shape[1] else load[rank] + share[expert]

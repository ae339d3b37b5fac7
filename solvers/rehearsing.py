"""Compile what a solver runs before its time begins.

Kernels are compiled for the types of the arrays that they get, in the first run on a machine: some
seconds, after which the machine code lies on disk. A time limit is not there to pay for them, nor
for slow imports. So the solver is run on a miniature of the problem, with arrays of the same types,
for a few steps.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from solvers import bounds, check
from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import Solver
from solvers.result import InfeasibleProblem, NoSolutionFound

QUESTIONS = 100  # after which a rehearsal ends
EXPERTS, RANKS, TOKENS = 8, 4, 64  # of a miniature; TOKENS for each scenario

_rehearsed: set[tuple[object, ...]] = set()


@dataclass
class _FewSteps(Budget):
    """Expired after QUESTIONS questions, or when the budget that it shares a flag with is."""

    questions: int = QUESTIONS

    def part(self, share: float) -> Budget:
        return replace(self, questions=int(share * self.questions))

    def expired(self) -> bool:
        self.questions -= 1
        return self.questions < 0 or super().expired()


def rehearse(problem: Problem, solver: Solver, budget: Budget) -> None:
    """Run `solver` on a miniature of `problem`, once per process and kind of problem.

    The time does not count as the budget's. Ctrl-C, as far as it stops the budget, ends it early.
    """
    kind = (solver.name, *_kind(problem))
    if kind in _rehearsed:
        return
    with budget.paused():
        small = miniature(problem)
        with suppress(InfeasibleProblem, NoSolutionFound, ValueError):
            few = _FewSteps(effort=budget.effort, _stop=budget._stop)
            check.check(small, solver.function(small, 0, few).placement)
        bounds.lower_bound(small)
    if not budget.interrupted:
        _rehearsed.add(kind)


def _kind(problem: Problem) -> tuple[object, ...]:
    """What decides which kernels run, and for which types."""
    found: list[object] = [problem.num_slots > problem.num_experts, problem.num_nodes > 1]
    for field in fields(problem):
        value = getattr(problem, field.name)
        if isinstance(value, np.ndarray):
            found.append(str(value.dtype))
        elif value is None or isinstance(value, (str, bool)):
            found.append(value)
    return tuple(found)


def miniature(problem: Problem) -> Problem:
    """A small problem with arrays of the same types; what they hold has no meaning."""
    rng = np.random.default_rng(0)
    num_layers = min(2, problem.num_layers)
    spare = problem.num_slots > problem.num_experts
    slots = EXPERTS // RANKS + spare
    num_scenarios = 1 if problem.scenario_load is None else 2 * problem.num_workloads
    count = TOKENS * num_scenarios
    top_k = 1 if problem.tokens is None else min(problem.tokens.shape[2], EXPERTS // 2)
    chosen = np.argsort(rng.random((count, num_layers, EXPERTS)))[:, :, :top_k]
    at_least_one = (num_layers, EXPERTS)

    def like(array: NDArray[np.generic] | None, values: object) -> NDArray[np.generic] | None:
        """Values in the type of an array, None where there is none."""
        return None if array is None else np.array(values).astype(array.dtype)

    load = np.array([np.bincount(row.ravel(), minlength=EXPERTS) for row in chosen.swapaxes(0, 1)])
    square = rng.integers(1, 9, (num_layers, EXPERTS, EXPERTS))
    flow = square[1:]
    rows = np.arange(EXPERTS).reshape(RANKS, -1)
    current = np.pad(rows, ((0, 0), (0, int(spare))), constant_values=-1).ravel()
    pinned = np.full(at_least_one, -1)
    pinned[:, 0] = 0
    arrays = {
        "load": load + 1,
        "coactivation": square + square.swapaxes(1, 2),
        "affinity": flow,
        "primary_affinity": flow,
        "tokens": chosen,
        "primary": chosen[:, :, 0],
        "home": np.arange(count) % RANKS,
        "batch": np.arange(count) // TOKENS,
        "scenario_load": np.broadcast_to(load + 1, (num_scenarios, *load.shape)),
        "scenario": np.arange(count) // TOKENS,
        "workload": np.arange(num_scenarios) % problem.num_workloads,
        "rank_speed": np.ones(RANKS),
        "rank_slots": np.full((num_layers, RANKS), slots),
        "pinned": pinned,
        "current": np.broadcast_to(current, (num_layers, current.size)),
        "link_cost": 1 - np.eye(RANKS),
    }
    given = {field.name: getattr(problem, field.name) for field in fields(problem)}
    given |= {name: like(given[name], values) for name, values in arrays.items()}
    given |= {
        "num_ranks": RANKS,
        "slots_per_rank": slots,
        "ranks_per_node": RANKS if problem.num_nodes == 1 else RANKS // 2,
        "num_groups": 1,
        "slot_budget": None if problem.slot_budget is None else num_layers * slots,
        "max_moves": None if problem.max_moves is None else num_layers,
    }
    return Problem(**given)

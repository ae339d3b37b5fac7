"""The default: the local search, and beside it what is quick and might be better.

For objective balance the greedy packing of EPLB is tried as well; for affinity and co-activation
`pairwise` takes the local search's place, and with restrictions, which it does not know, `auto`
refuses. Of the placements
that keep the cap, the one with the best objective is returned, the first one's on a tie. Source:
placer.
"""

from __future__ import annotations

from solvers import check
from solvers.budget import Budget
from solvers.problem import Problem
from solvers.registry import get, register
from solvers.result import RequestError, Solution


@register("auto", source="placer", replicates=True, restricted=True)
def auto(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Picks solvers by the problem and returns the best plan."""
    from solvers.solving import keeps_cap

    names = ["local_search"]
    if problem.objective == "balance" and not problem.restrictions:
        names.append("eplb")
    if problem.objective in check.PAIRWISE:
        if problem.restrictions:
            asked = " and ".join(problem.restrictions)
            raise RequestError(
                f"no solver minimises {problem.objective} and keeps {asked}; "
                "leave out --objective: fewer messages need what is used together to be together"
            )
        names = ["pairwise"]
        if problem.num_slots > problem.num_experts:
            names.append("local_search")  # which places replicas
    best: tuple[tuple[bool, float], Solution] | None = None
    for name in names:
        followed = name == "pairwise" and len(names) > 1
        part = budget.part(0.5) if followed else budget
        solution = get(name).function(problem, seed, part)
        solution.notes["chosen"] = name
        if len(names) == 1:
            return solution
        parts = check.check(problem, solution.placement)
        worth = (not keeps_cap(problem, parts), check.objective(problem, parts))
        if best is None or worth < best[0]:
            best = worth, solution
    assert best is not None
    return best[1]

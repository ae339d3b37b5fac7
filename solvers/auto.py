"""The default: the local search, and beside it what is quick and might be better.

For affinity and co-activation `pairwise` takes the local search's place, and with restrictions,
which it does not know, `auto` refuses. The greedy packing of EPLB is tried as well for objective
balance, and where spare slots stay empty otherwise; where the cap is broken otherwise, EPLB's or
the local search, whichever was not tried. The best of the placements is returned, the first one on
a tie; one that keeps the cap is better than any that does not, and of those that do not the more
balanced one is. Source: placer.
"""

from __future__ import annotations

from dataclasses import replace

from solvers import check
from solvers.budget import Budget
from solvers.preferring import imbalance_of_loads, or_current, worth
from solvers.problem import Problem
from solvers.registry import get, register
from solvers.result import RequestError, Solution


@register("auto", source="placer", replicates=True, restricted=True)
def auto(problem: Problem, seed: int, budget: Budget) -> Solution:
    """Picks solvers by the problem and returns the best plan."""
    spare = problem.num_slots > problem.num_experts
    # the local search places replicas for the tokens that choose them
    replicates = spare and problem.tokens is not None
    names = ["local_search"]
    if problem.objective in check.PAIRWISE:
        if problem.restrictions:
            asked = " and ".join(problem.restrictions)
            raise RequestError(
                f"no solver minimises {problem.objective} and keeps {asked}; "
                "leave out --objective: fewer messages need what is used together to be together"
            )
        names = ["pairwise"]
        if replicates:
            names.append("local_search")

    def found_by(name: str, part: Budget) -> Solution:
        solution = get(name).function(problem, seed, part)
        solution.notes["chosen"] = name
        return solution

    found = [
        found_by(name, budget.part(1 / (len(names) - number))) for number, name in enumerate(names)
    ]
    if not problem.restrictions:
        packs = spare and (not replicates or problem.dispatch == "allgather")
        if problem.objective == "balance" or packs:
            found.append(found_by("eplb", budget))
        elif not spare and _breaks_cap(problem, found[0]):
            other = "eplb" if names[0] == "local_search" else "local_search"
            found.append(found_by(other, budget))
    best = found[0]
    if len(found) > 1:
        best = min(found, key=lambda solution: worth(problem, solution.placement))
    if best.notes["chosen"] != "local_search":  # which has compared it
        best = replace(best, placement=or_current(problem, best.placement))
    ended = budget.termination()
    return best if ended == "finished" else replace(best, termination=ended)


def _breaks_cap(problem: Problem, solution: Solution) -> bool:
    """Of experts with a copy each."""
    from solvers.solving import TOLERANCE

    cap = problem.max_imbalance
    if cap is None:
        return False
    return imbalance_of_loads(problem, solution.placement) > cap * (1 + TOLERANCE)

"""Placement solvers for Mixture-of-Experts inference: arrays in, arrays out.

    result = solvers.solve(solvers.Problem(load=load, num_ranks=8, ...), solver="eplb", seed=0)

This package knows nothing of files, torch or the command line.
"""

from solvers.budget import Budget
from solvers.frontier import frontier, knee
from solvers.problem import Problem
from solvers.registry import get, names, register
from solvers.result import InfeasibleProblem, NoSolutionFound, RequestError, Result, Solution
from solvers.solving import capped_imbalance, ctrl_c_stops, solve

__all__ = [
    "Budget",
    "InfeasibleProblem",
    "NoSolutionFound",
    "Problem",
    "RequestError",
    "Result",
    "Solution",
    "capped_imbalance",
    "ctrl_c_stops",
    "frontier",
    "get",
    "knee",
    "names",
    "register",
    "solve",
]

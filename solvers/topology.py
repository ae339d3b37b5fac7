"""What messages cost between ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.problem import Problem


def link_costs(problem: Problem) -> NDArray[np.float64]:
    """[G, G] cost of a message from one rank to another, 0 on the diagonal.

    `Problem.link_cost`, or 1 within a node and 1 + node_weight between nodes.
    """
    if problem.link_cost is not None:
        return problem.link_cost
    node = np.arange(problem.num_ranks) // problem.ranks_per_node
    cost: NDArray[np.float64] = 1.0 + problem.node_weight * (node[:, None] != node)
    return cost - np.diag(np.diag(cost))

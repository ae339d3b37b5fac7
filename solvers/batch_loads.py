"""Loads of one batch after another, for the methods that want a time series."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.problem import Problem


def load_over_batches(problem: Problem) -> NDArray[np.float64]:
    """[B, L, E] token-expert pairs that each expert receives in each batch, in the batches' order.

    Counted on `problem.tokens`, which may be a sample of what `problem.load` counts.
    """
    tokens, batch = problem.tokens, problem.batch
    assert tokens is not None
    assert batch is not None
    num_layers, num_experts = problem.load.shape
    _, number = np.unique(batch, return_inverse=True)
    num_batches = int(number.max()) + 1
    loads = np.empty((num_batches, num_layers, num_experts))
    for layer in range(num_layers):
        experts = tokens[:, layer, :]
        key = (number[:, None] * num_experts + experts)[experts >= 0]
        counts = np.bincount(key, minlength=num_batches * num_experts)
        loads[:, layer] = counts.reshape(num_batches, num_experts)
    return loads

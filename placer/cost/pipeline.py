"""Overlap of communication and computation by micro-batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def makespan(dispatch_us: Times, compute_us: Times, combine_us: Times) -> Times:
    """[n] when the last layer's last combine ends, of times [n, M, L] of M micro-batches.

    One communication at a time and one computation at a time, each in this order: layer by layer,
    the dispatches of all micro-batches and then their combines; the computations in the order of
    the micro-batches. A micro-batch's layer is dispatch, compute, combine, one after the other, and
    its next layer begins when it is done. With one micro-batch that is the sum.

    O(M L) steps on [n].
    """
    n, num_parts, num_layers = dispatch_us.shape
    network = np.zeros(n)  # when the network, the devices are free again
    device = np.zeros(n)
    done = np.zeros((num_parts, n))  # when each micro-batch's last step ended
    for layer in range(num_layers):
        for part in range(num_parts):
            network = np.maximum(network, done[part]) + dispatch_us[:, part, layer]
            done[part] = network
        for part in range(num_parts):
            device = np.maximum(device, done[part]) + compute_us[:, part, layer]
            done[part] = device
        for part in range(num_parts):
            network = np.maximum(network, done[part]) + combine_us[:, part, layer]
            done[part] = network
    latest: Times = done.max(axis=0)
    return latest

"""Which copy of an expert serves a token, under each dispatch model and replica policy."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.placement import Placement
from placer.trace.model import Trace
from solvers.problem import Dispatch

ReplicaPolicy = Literal["local", "round_robin"]


class Server:
    """Sends token-expert pairs to ranks.

    Args:
        placement: where the experts are.
        dispatch: `coherent` moves a token's home to its primary expert's rank after each layer;
            under the other models it stays.
        replica_policy: `local` (home rank, then ranks and nodes that the token uses anyway, then
            the least loaded) or `round_robin` (token index mod copies); see docs/metrics.md.

    Attributes:
        depends_on_home: whether home ranks and loads decide which copy serves a pair.

    Raises:
        UsageError: the placement is unsound, or an argument is unknown.
    """

    def __init__(
        self, placement: Placement, dispatch: Dispatch, replica_policy: ReplicaPolicy
    ) -> None:
        for value, known in ((dispatch, Dispatch), (replica_policy, ReplicaPolicy)):
            if value not in get_args(known):
                raise UsageError(f"unknown {value!r}, expected one of {', '.join(get_args(known))}")
        problems = placement.problems()
        if problems:
            raise UsageError(f"the placement is unsound: {problems[0]}")
        self.placement = placement
        self._coherent = dispatch == "coherent"
        self._ranks = placement.ranks_of_experts()
        self._copies = (self._ranks >= 0).sum(axis=2).astype(np.int32)
        self.depends_on_home = replica_policy == "local" and self._ranks.shape[2] > 1

    def check(self, trace: Trace) -> None:
        """Raise UsageError when the trace is of another model than the placement."""
        found = (trace.num_layers, trace.num_experts)
        expected = (self.placement.num_layers, self.placement.num_experts)
        if found != expected:
            raise UsageError(
                f"the trace has {found[0]} layers of {found[1]} experts, "
                f"the placement {expected[0]} layers of {expected[1]}"
            )

    def serve(
        self,
        experts: NDArray[np.int32],
        weights: NDArray[np.float32],
        home: NDArray[np.int32],
        index: NDArray[np.int64],
        batch: NDArray[np.int32],
        running: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        """[T, L, K] rank that serves each pair, -1 = unused. O(T L K C).

        Args:
            experts, weights: from `kernel_arrays`.
            home: [T] rank where each token enters the first layer.
            index: [T] index of each token in the trace.
            batch: [T] row of `running` that each token's batch has.
            running: [N, L, G] pairs served so far in each batch; updated where
                `depends_on_home`, else not looked at.
        """
        from placer.cost import kernels

        served = np.empty_like(experts)
        if self.depends_on_home:
            kernels.serve_local(
                experts,
                weights,
                self._ranks,
                self._copies,
                home,
                self._coherent,
                batch,
                running,
                self.placement.ranks_per_node,
                served,
            )
        else:
            kernels.serve_round_robin(experts, self._ranks, self._copies, index, served)
        return served


def kernel_arrays(
    trace: Trace, tokens: slice | NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Experts [t, L, K] and weights [t, L, K] ([0, 0, 0] without) of some tokens.

    Copies of one type and layout, so that every kernel is compiled once.
    """
    experts = np.array(trace.experts[tokens], np.int32, order="C")
    if trace.weights is None:
        return experts, np.zeros((0, 0, 0), np.float32)
    return experts, np.array(trace.weights[tokens], np.float32, order="C")


def home_ranks(trace: Trace, num_ranks: int, *, ignore_home: bool = False) -> NDArray[np.int32]:
    """[T] rank where each token enters: what the trace recorded, else request mod num_ranks."""
    if trace.home is None or ignore_home:
        return (trace.request % num_ranks).astype(np.int32)
    outside = (trace.home < 0) | (trace.home >= num_ranks)
    if outside.any():
        raise UsageError(
            f"the trace records home rank {int(trace.home[outside][0])}, "
            f"the placement has {num_ranks} ranks",
            "the trace was captured on other ranks: ignore its homes",
        )
    return trace.home.astype(np.int32)

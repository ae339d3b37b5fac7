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
            where its home sent least) or `round_robin` (request + position mod copies); see
            docs/metrics.md.

    Attributes:
        depends_on_home: whether homes and what they have sent decide which copy serves a pair.

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

    def nothing_sent(self, num_batches: int) -> NDArray[np.int32]:
        """[N, G, L, G] zeros for `serve`; [0, G, L, G] where nothing depends on them."""
        num_ranks = self.placement.num_ranks
        rows = num_batches if self.depends_on_home else 0
        return np.zeros((rows, num_ranks, self.placement.num_layers, num_ranks), np.int32)

    def serve(
        self,
        experts: NDArray[np.int32],
        weights: NDArray[np.float32],
        home: NDArray[np.int32],
        turn: NDArray[np.int64],
        batch: NDArray[np.int32],
        sent: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        """[T, L, K] rank that serves each pair, -1 = unused. O(T L K C).

        Args:
            experts, weights: from `kernel_arrays`.
            home: [T] rank where each token enters the first layer.
            turn: [T] request + position of each token.
            batch: [T] row of `sent` that each token's batch has.
            sent: [N, G, L, G] pairs that each home rank has sent so far in each batch; updated
                where `depends_on_home`, else not looked at.
        """
        from placer.cost import serving_kernels as kernels

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
                sent,
                self.placement.ranks_per_node,
                served,
            )
        else:
            kernels.serve_round_robin(experts, self._ranks, self._copies, turn, served)
        return served


def serve_layer(
    experts: NDArray[np.int32],
    ranks: NDArray[np.int32],
    copies: NDArray[np.int32],
    home: int,
    num_ranks: int,
    ranks_per_node: int,
) -> NDArray[np.int32]:
    """[t, K] rank that serves each pair of one home rank's tokens in one layer of one pass.

    What a running rank decides by itself under the policy `local`; the replay decides the same.
    O(t K C).

    Args:
        experts: [t, K] logical ids of the tokens that `home` holds, in the order of the pass;
            -1 = unused.
        ranks: [E, C] ranks of each expert's copies, increasing, padded with -1; a layer of
            `Placement.ranks_of_experts()`.
        copies: [E] number of copies.
        home: the rank that decides.
        num_ranks, ranks_per_node: of the placement.
    """
    from placer.cost import serving_kernels as kernels

    served = np.empty((experts.shape[0], 1, experts.shape[1]), np.int32)
    kernels.serve_local(
        np.ascontiguousarray(experts, np.int32)[:, None],
        np.zeros((0, 0, 0), np.float32),
        ranks[None],
        copies[None],
        np.full(experts.shape[0], home, np.int32),
        False,
        np.zeros(experts.shape[0], np.int32),
        np.zeros((1, num_ranks, 1, num_ranks), np.int32),
        ranks_per_node,
        served,
    )
    return served[:, 0]


def turns_of(trace: Trace, tokens: slice | NDArray[np.int64]) -> NDArray[np.int64]:
    """[t] request + position of some tokens: whose turn it is under the policy `round_robin`."""
    turns: NDArray[np.int64] = trace.request[tokens] + trace.position[tokens]
    return turns


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

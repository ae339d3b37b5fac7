"""`Problem`: what a placement solver is given. Arrays only; no files, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Dispatch = Literal["alltoall", "coherent", "allgather"]
Objective = Literal["traffic", "balance", "latency"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """Place E experts of each of L layers into slots_per_rank slots on each of G ranks.

    Shape letters: L layers, E experts, G ranks, S = G * slots_per_rank slots, T tokens, K experts
    per token. Slot s belongs to rank s // slots_per_rank; rank g to node g // ranks_per_node.

    Attributes:
        load: [L, E] token-expert pairs that each expert receives.
        num_ranks: G.
        slots_per_rank: slots of one rank in one layer; G * slots_per_rank >= E.
        ranks_per_node: ranks that share fast links; divides num_ranks.
        coactivation: [L, E, E] tokens that chose both experts (symmetric, diagonal = load).
        affinity: [L-1, E, E] flow from an expert to an expert of the next layer; a token adds
            1 / (k_l * k_{l+1}) to each of its pairs.
        primary_affinity: [L-1, E, E] tokens whose primary expert of layer l is the row and that
            use the column in layer l+1.
        tokens: [T, L, K] logical expert ids, -1 = unused, used ones first: the tokens (or a sample
            of them) that the plan is fitted to. The exact objectives need them.
        primary: [T, L] primary expert of each of `tokens`, -1 where a token used none.
        home: [T] home rank of each of `tokens` on entering the first layer.
        batch: [T] batch number of each of `tokens`, non-decreasing; imbalance over batches.
        dispatch: which traffic counts.
        objective: what to minimise.
        max_imbalance: cap on the mean over layers of max / mean rank load; None = no cap.
        node_weight: what a message that crosses nodes costs more than one inside a node,
            in units of the latter; traffic = messages + node_weight * node messages.
        num_groups: groups of consecutive experts that the model's router limits a token to some of
            (8 in DeepSeek-V3); divides E. 1 = the router has no groups.
        latency_load_us, latency_message_us: for objective `latency`: microseconds of a layer per
            token-expert pair on the busiest rank, and per message of the average rank.
    """

    load: NDArray[np.float64]
    num_ranks: int
    slots_per_rank: int
    ranks_per_node: int
    coactivation: NDArray[np.float64] | None = None
    affinity: NDArray[np.float64] | None = None
    primary_affinity: NDArray[np.float64] | None = None
    tokens: NDArray[np.integer] | None = None
    primary: NDArray[np.integer] | None = None
    home: NDArray[np.int64] | None = None
    batch: NDArray[np.int64] | None = None
    dispatch: Dispatch = "alltoall"
    objective: Objective = "traffic"
    max_imbalance: float | None = None
    node_weight: float = 0.0
    latency_load_us: float = 0.0
    latency_message_us: float = 0.0
    num_groups: int = 1

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def num_slots(self) -> int:
        """Slots per layer over all ranks (S)."""
        return self.num_ranks * self.slots_per_rank

    def __post_init__(self) -> None:
        num_layers, num_experts = self.load.shape
        if min(self.num_ranks, self.slots_per_rank, self.ranks_per_node) < 1:
            raise ValueError("num_ranks, slots_per_rank and ranks_per_node must be positive")
        if self.num_ranks % self.ranks_per_node:
            raise ValueError(
                f"{self.ranks_per_node} ranks per node do not divide {self.num_ranks} ranks"
            )
        if self.num_slots < num_experts:
            raise ValueError(
                f"{self.num_ranks} ranks x {self.slots_per_rank} slots = {self.num_slots} slots "
                f"cannot hold {num_experts} experts"
            )
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"{self.num_groups} groups do not divide {num_experts} experts")
        for name, shape in {
            "coactivation": (num_layers, num_experts, num_experts),
            "affinity": (num_layers - 1, num_experts, num_experts),
            "primary_affinity": (num_layers - 1, num_experts, num_experts),
        }.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if self.tokens is not None and self.tokens.shape[1] != num_layers:
            raise ValueError(f"tokens have {self.tokens.shape[1]} layers, load has {num_layers}")
        if self.tokens is not None and len(self.tokens) == 0:  # nothing to count on
            for name in ("tokens", "primary", "home", "batch"):
                object.__setattr__(self, name, None)
        if self.tokens is not None:
            for name in ("primary", "home", "batch"):
                array = getattr(self, name)
                if array is not None and len(array) != len(self.tokens):
                    raise ValueError(f"{name} has {len(array)} rows, tokens {len(self.tokens)}")
            home = self.home
            if home is not None and (home.min() < 0 or home.max() >= self.num_ranks):
                raise ValueError(
                    f"home ranks {home.min()}..{home.max()}, expected 0..{self.num_ranks - 1}"
                )
        if self.max_imbalance is not None and self.max_imbalance < 1:
            raise ValueError(f"max_imbalance is {self.max_imbalance}; no plan is below 1")

"""`Problem`: what a placement solver is given. Arrays only; no files, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from solvers.result import InfeasibleProblem

Dispatch = Literal["alltoall", "coherent", "allgather"]
Objective = Literal["traffic", "balance", "latency", "affinity", "coactivation"]
Robust = Literal["mean", "worst", "cvar"]

NUM_FOLDS = 3  # that the parts of a workload's requests are dealt out to
NUM_PARTS = 24  # of a workload's requests, where they are many enough to resample


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
        max_imbalance: cap on the mean over layers of max / mean rank load, over the scenarios where
            there are any (with `folds`, over what is left without each); None = no cap.
        scenario_load: [C, L, E] load in each scenario that balance is asked of: batches, workloads,
            or folds of the requests.
        folds: the scenarios are parts of each workload's requests, dealt out in turn to three folds
            (or two of two). Balance is asked of what is left of a workload without each fold, so
            that the chance of the sample is seen.
        resampled: with `folds`, and 24 parts of each workload: balance is asked of balanced halves
            of them instead, which scatter about the whole as the whole does about the truth.
        scenario: [T] scenario of each of `tokens`; with redundant slots or several workloads it
            goes with scenario_load.
        workload: [C] workload that each scenario belongs to, 0..W-1; None = all to one. A plan for
            several workloads is judged by `robust`; each counts alike, whatever its size.
        robust: what several workloads come to: their `mean`, the `worst` of them, or the mean of
            the worse half (`cvar`); of the traffic, and of the imbalance averaged over a workload's
            scenarios.
        rank_speed: [G] how fast each rank computes, in any unit; a rank's load counts in units of
            what is fair for its speed. None = all alike.
        rank_slots: [L, G] slots that each rank may fill; None = slots_per_rank.
        slot_budget: most slots of one rank that are filled, summed over layers; the solver decides
            how many of them each layer gets, up to slots_per_rank. None = no such limit.
        pinned: [L, E] rank that an expert must have a copy on, -1 = anywhere.
        current: [L, S] the placement in use; the search may start there, and moves are counted.
        max_moves: most copies of experts, over all layers, on ranks that do not hold them in
            `current`; None = any number.
        link_cost: [G, G] cost of a message from one rank to another in place of 1 and node_weight,
            e.g. by measured bandwidths; the diagonal is 0.
        node_weight: what a message that crosses nodes costs more than one inside a node,
            in units of the latter; traffic = messages + node_weight * node messages.
        num_groups: groups of consecutive experts that the model's router limits a token to some of
            (8 in DeepSeek-V3); divides E. 1 = the router has no groups.
        latency_load_us, latency_message_us: for objective `latency`: microseconds of a layer per
            token-expert pair on the busiest rank, and per message of the average rank.

    Raises:
        InfeasibleProblem: the slots, pins or slot budget leave no placement, whatever the solver.
        ValueError: arrays or figures that contradict each other.
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
    scenario_load: NDArray[np.float64] | None = None
    folds: bool = False
    resampled: bool = False
    scenario: NDArray[np.int64] | None = None
    workload: NDArray[np.int64] | None = None
    robust: Robust = "mean"
    rank_speed: NDArray[np.float64] | None = None
    rank_slots: NDArray[np.int64] | None = None
    slot_budget: int | None = None
    pinned: NDArray[np.int64] | None = None
    current: NDArray[np.int64] | None = None
    max_moves: int | None = None
    link_cost: NDArray[np.float64] | None = None

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
            raise InfeasibleProblem(
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
        self._check_scenarios()
        self._check_ranks()
        self._check_changes()

    def _check_scenarios(self) -> None:
        loads = self.scenario_load
        if loads is None:
            if self.scenario is not None or self.workload is not None or self.folds:
                raise ValueError("scenario, workload and folds need scenario_load")
            return
        if loads.ndim != 3 or loads.shape[0] == 0 or loads.shape[1:] != self.load.shape:
            raise ValueError(
                f"scenario_load has shape {loads.shape}, expected (C, {self.num_layers}, "
                f"{self.num_experts})"
            )
        num_scenarios = loads.shape[0]
        workload = self.workload
        if workload is not None and (
            workload.shape != (num_scenarios,)
            or not np.array_equal(np.unique(workload), np.arange(self.num_workloads))
        ):
            raise ValueError("workload must give each scenario one of 0..W-1, none left out")
        if self.folds and np.bincount(self.workload_of_scenarios).min() < 2:
            raise ValueError("a workload must have two folds or more")
        if self.scenario is None or self.tokens is None:
            if self.num_workloads > 1 and self.tokens is not None:
                raise ValueError("several workloads need the scenario of each token")
            if self.num_slots > self.num_experts and self.tokens is not None:
                raise ValueError(
                    "with redundant slots scenario_load needs the scenario of each token: which "
                    "copies serve them decides the balance"
                )
            object.__setattr__(self, "scenario", None)
            return
        if self.scenario.shape != (len(self.tokens),):
            raise ValueError(f"scenario has {self.scenario.shape}, tokens {len(self.tokens)}")
        if self.scenario.min() < 0 or self.scenario.max() >= num_scenarios:
            raise ValueError(f"scenario numbers must be 0..{num_scenarios - 1}")
        if len(np.unique(self.token_workload)) != self.num_workloads:
            raise ValueError("some workload has none of `tokens`")

    def _check_ranks(self) -> None:
        speed, slots, cost = self.rank_speed, self.rank_slots, self.link_cost
        if speed is not None and (speed.shape != (self.num_ranks,) or not (speed > 0).all()):
            raise ValueError(f"rank_speed must be {self.num_ranks} positive numbers")
        if slots is not None:
            if slots.shape != (self.num_layers, self.num_ranks):
                raise ValueError(f"rank_slots has shape {slots.shape}, expected (L, G)")
            if slots.min() < 0 or slots.max() > self.slots_per_rank:
                raise ValueError(f"rank_slots must be 0..{self.slots_per_rank}")
            short = slots.sum(axis=1) < self.num_experts
            if short.any():
                layer = int(np.argmax(short))
                raise InfeasibleProblem(
                    f"layer {layer}: the ranks' {int(slots[layer].sum())} slots cannot hold "
                    f"{self.num_experts} experts"
                )
        if cost is not None and (
            cost.shape != (self.num_ranks, self.num_ranks)
            or not (cost >= 0).all()
            or np.diag(cost).any()
        ):
            raise ValueError("link_cost must be [G, G], 0 or more, and 0 on the diagonal")
        least = -(-self.num_experts // self.num_ranks) * self.num_layers
        if self.slot_budget is not None and self.slot_budget < least:
            raise InfeasibleProblem(
                f"{self.slot_budget} slots per rank over all layers; {self.num_layers} layers of "
                f"{self.num_experts} experts need {least}"
            )

    def _check_changes(self) -> None:
        pinned, current = self.pinned, self.current
        if pinned is not None:
            if pinned.shape != self.load.shape:
                raise ValueError(f"pinned has shape {pinned.shape}, expected {self.load.shape}")
            if pinned.min() < -1 or pinned.max() >= self.num_ranks:
                raise ValueError(f"pinned ranks must be -1..{self.num_ranks - 1}")
            room = self.slots_of_ranks
            for layer in range(self.num_layers):
                held = pinned[layer][pinned[layer] >= 0]
                if (np.bincount(held, minlength=self.num_ranks) > room[layer]).any():
                    raise InfeasibleProblem(
                        f"layer {layer}: more experts are pinned to a rank than fit"
                    )
        if current is not None and current.shape != (self.num_layers, self.num_slots):
            raise ValueError(
                f"current has shape {current.shape}, expected {(self.num_layers, self.num_slots)}"
            )
        if current is not None:
            self._check_current(current)
        if self.max_moves is not None and (current is None or self.max_moves < 0):
            raise ValueError("max_moves must be 0 or more, and needs current")

    def _check_current(self, current: NDArray[np.int64]) -> None:
        if current.min() < -1 or current.max() >= self.num_experts:
            raise ValueError(f"experts of current must be -1..{self.num_experts - 1}")
        layer, slot = np.nonzero(current >= 0)
        count = np.zeros((self.num_layers, self.num_experts, self.num_ranks), np.int64)
        np.add.at(count, (layer, current[layer, slot], slot // self.slots_per_rank), 1)
        if (count > 1).any() or not count.any(axis=2).all():
            raise ValueError("current must hold every expert of a layer, on a rank at most once")

    @property
    def restrictions(self) -> tuple[str, ...]:
        """What is asked of where experts sit, beyond slots_per_rank; not every solver knows it."""
        names = ("rank_slots", "slot_budget", "pinned", "max_moves")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def num_workloads(self) -> int:
        """W."""
        return 1 if self.workload is None else int(self.workload.max()) + 1

    @property
    def workload_of_scenarios(self) -> NDArray[np.int64]:
        """[C] workload of each scenario; one scenario where there is no `scenario_load`."""
        if self.workload is not None:
            return self.workload
        return np.zeros(1 if self.scenario_load is None else len(self.scenario_load), np.int64)

    def of_workloads(self, loads: NDArray[Any]) -> NDArray[Any]:
        """[W, ...] the sum of loads [C, ...] over each workload's scenarios."""
        total = np.zeros((self.num_workloads, *loads.shape[1:]), loads.dtype)
        np.add.at(total, self.workload_of_scenarios, loads)
        return total

    def judged(self, loads: NDArray[Any]) -> NDArray[Any]:
        """[R, ...] the loads that balance is asked of, from those of the scenarios [C, ...]."""
        if not self.folds:
            return loads
        summed: NDArray[Any] = np.tensordot(self._judging[0], loads, axes=1)
        return summed

    @property
    def workload_of_judged(self) -> NDArray[np.int64]:
        """[R] workload of each of the loads that balance is asked of."""
        return self._judging[1] if self.folds else self.workload_of_scenarios

    @cached_property
    def _judging(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """[R, C] 1 where a judged sample holds a scenario; [R] the workload of each sample."""
        workload = self.workload_of_scenarios
        halved = self.resampled and bool((np.bincount(workload) == NUM_PARTS).all())
        rows = []
        for number in range(self.num_workloads):
            own = np.nonzero(workload == number)[0]
            fold = np.arange(own.size) % NUM_FOLDS
            held = balanced_halves() if halved else np.unique(fold)[:, None] != fold
            whole = np.zeros((len(held), workload.size))
            whole[:, own] = held
            rows.append(whole)
        of_row = np.repeat(np.arange(self.num_workloads), [len(own) for own in rows])
        return np.concatenate(rows), of_row

    @property
    def token_workload(self) -> NDArray[np.int64]:
        """[T] workload of each of `tokens`."""
        assert self.tokens is not None
        if self.workload is None or self.scenario is None:
            return np.zeros(len(self.tokens), np.int64)
        found: NDArray[np.int64] = self.workload[self.scenario]
        return found

    @property
    def slots_of_ranks(self) -> NDArray[np.int64]:
        """[L, G] slots that each rank may fill."""
        if self.rank_slots is not None:
            return self.rank_slots
        return np.full((self.num_layers, self.num_ranks), self.slots_per_rank, np.int64)

    @property
    def fair_share(self) -> NDArray[np.float64]:
        """[G] load that is fair for each rank's speed, in units of the mean rank load."""
        if self.rank_speed is None:
            return np.ones(self.num_ranks)
        share: NDArray[np.float64] = self.rank_speed / self.rank_speed.mean()
        return share

    def aggregate(self, figures: NDArray[np.float64]) -> NDArray[np.float64]:
        """[...] what a figure of each workload [..., W] comes to under `robust`."""
        combined: NDArray[np.float64]
        if self.robust == "worst":
            combined = figures.max(axis=-1)
        elif self.robust == "cvar":
            worse = num_worse(figures.shape[-1])
            combined = np.sort(figures, axis=-1)[..., -worse:].mean(axis=-1)
        else:
            combined = figures.mean(axis=-1)
        return combined


def balanced_halves() -> NDArray[np.bool_]:
    """[46, 24] which of 24 parts each half holds: 12 of them, two parts together in 11 of 23.

    The mean over halves of a quadratic function of their loads is the same as over all halves
    (balanced repeated replication: McCarthy, Pseudo-replication: half samples, 1969). Rows of a
    Hadamard matrix (Paley, 1933) and their complements.
    """
    prime = NUM_PARTS - 1
    squares = np.isin(np.arange(prime), np.arange(1, prime) ** 2 % prime)
    shifted = (np.arange(prime)[None, :] - np.arange(prime)[:, None]) % prime
    half = np.pad(squares[shifted], ((0, 0), (0, 1)), constant_values=True)
    return np.concatenate([half, ~half])


def num_worse(num_workloads: int) -> int:
    """Workloads that `cvar` averages over: the worse half, rounded up."""
    return -(-num_workloads // 2)

"""`Settings`: what the user asks of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from placer.plan import Dispatch

if TYPE_CHECKING:
    from placer.cost import ReplicaPolicy

DEFAULT_MAX_IMBALANCE = 1.10
DEFAULT_NODE_WEIGHT = 4.0
PROFILE_TOKENS = 65536
CAPPED_SOLVERS = ("auto", "local_search")

BalanceOver = Literal["requests", "batches", "workloads", "trace"]
Robust = Literal["mean", "worst", "cvar"]
Progress = Callable[[str], None]
"""Called with what is being done now."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asks of a plan.

    Attributes:
        num_ranks, num_nodes: GPUs, and hosts that they are spread over evenly.
        slots_per_rank: experts that a rank can hold per layer; None = just enough.
        dispatch, objective: see DESIGN in docs/metrics.md.
        max_imbalance: cap on the mean over layers of max / mean rank load; None = no cap.
        cap_is_default: nobody asked for the cap: where it cannot be kept, the least imbalance that
            was found is good enough.
        phase: "prefill", "decode", or None for both.
        solver, seed, time_limit_s: how to search.
        holdout: share of the requests that judge the plan.
        in_sample: fit to all requests and judge on the same ones, labelled so.
        profile_tokens: at most this many tokens, evenly spaced, for the exact objectives.
        node_weight: what a message between nodes costs more than one inside a node; None = by the
            cluster's bandwidths, or DEFAULT_NODE_WEIGHT without a cluster.
        cluster: preset or TOML file of the cluster; None = unknown.
        model: preset or checkpoint whose dimensions count; None = those of the trace.
        expert_groups: groups of consecutive experts that the router limits a token to some of;
            None = those of `model`, or one.
        kv_tokens, reserve: see `placer.models.memory_of`; with `model` and `cluster`.
        replica_policy: how a token chooses among copies when the plan is judged.
        balance_over: what imbalance is the mean of while solving: the `requests` without each of a
            few folds, so that it comes out on others as asked for; `batches` (forward passes);
            `workloads` (labels, or traces); or the whole `trace` at once. None = by the requests,
            or for objective balance, which folds do not help, the trace.
        robust: what several workloads come to, see `solvers.Problem`; None = they are one.
        start: a plan file whose placement is in use now.
        max_moves: most copies that may change their place against `start`.
        pins: "expert@rank" or "layer:expert@rank", layers by their real numbers.
        slot_budget: most slots that a rank fills, summed over layers.
        certify_s: seconds to prove bounds in; None = a little effort, on the objective only.
    """

    num_ranks: int
    num_nodes: int = 1
    slots_per_rank: int | None = None
    dispatch: Dispatch = "alltoall"
    objective: str = "traffic"
    max_imbalance: float | None = None
    cap_is_default: bool = False
    phase: str | None = None
    solver: str = "auto"
    seed: int = 0
    time_limit_s: float | None = None
    holdout: float = 0.5
    in_sample: bool = False
    profile_tokens: int = PROFILE_TOKENS
    node_weight: float | None = None
    cluster: str | None = None
    model: str | None = None
    expert_groups: int | None = None
    kv_tokens: int = 0
    reserve: float = 0.1
    replica_policy: ReplicaPolicy = "local"
    balance_over: BalanceOver | None = None
    robust: Robust | None = None
    start: str | None = None
    max_moves: int | None = None
    pins: tuple[str, ...] = ()
    slot_budget: int | None = None
    certify_s: float | None = None

    @property
    def averaged_over(self) -> BalanceOver:
        """What imbalance is averaged over, the default filled in."""
        if self.balance_over is not None:
            return self.balance_over
        return "trace" if self.objective == "balance" else "requests"

"""Judging a plan beside baselines on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from placer.placement import Placement
from placer.plan import Dispatch
from placer.trace.source import TraceSource

if TYPE_CHECKING:
    from placer.cost import ReplicaPolicy

FORMAT = "placer.evaluation"
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of a plan and its baselines on the same tokens.

    Attributes:
        scope: "held-out", "unseen" (a trace that the plan was not fitted to) or "in-sample".
        requests, tokens: how many judged.
        dispatch, replica_policy: how the tokens were served.
        home: where tokens enter: "recorded" in the trace, or "request" mod num_ranks.
        metrics: figure -> {value, low, high, unit}.
        baselines: name -> the same.
        changes: name -> figure -> {value, baseline, change, change_low, change_high}.
    """

    scope: str
    requests: int
    tokens: int
    dispatch: Dispatch
    replica_policy: ReplicaPolicy
    home: str
    metrics: dict[str, Any]
    baselines: dict[str, dict[str, Any]]
    changes: dict[str, dict[str, Any]]

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "scope": self.scope,
            "modelled": True,
            "requests": self.requests,
            "tokens": self.tokens,
            "dispatch": self.dispatch,
            "replica_policy": self.replica_policy,
            "home": self.home,
            "metrics": self.metrics,
            "baselines": self.baselines,
            "change": self.changes,
        }


def evaluate(
    placement: Placement,
    baselines: Mapping[str, Placement],
    judge: TraceSource,
    *,
    scope: str,
    dispatch: Dispatch = "alltoall",
    replica_policy: ReplicaPolicy = "local",
    batch_tokens: int = 256,
    seed: int = 0,
    num_resamples: int = 1000,
) -> Evaluation:
    """Replay `judge` under the placement and under each baseline. See `placer.cost.replay`."""
    from placer.cost import compare, measure, replay

    fewest = min(which.num_ranks for which in (placement, *baselines.values()))
    recorded = homes_fit(judge, fewest)

    def run(which: Placement) -> Any:
        return replay(
            judge.chunks(),
            which.for_rounds(judge.layer_ids),
            dispatch=dispatch,
            replica_policy=replica_policy,
            batch_tokens=batch_tokens,
            ignore_home=not recorded,
        )

    def figures(one: Any) -> dict[str, Any]:
        return measure(one, num_resamples=num_resamples, seed=seed).to_dict()

    ours = run(placement)
    theirs = {name: run(which) for name, which in baselines.items()}
    return Evaluation(
        scope=scope,
        requests=ours.num_requests,
        tokens=ours.num_tokens,
        dispatch=dispatch,
        replica_policy=replica_policy,
        home="recorded" if recorded else "request",
        metrics=figures(ours),
        baselines={name: figures(other) for name, other in theirs.items()},
        changes={
            name: compare(ours, other, num_resamples=num_resamples, seed=seed)
            for name, other in theirs.items()
        },
    )


def homes_fit(source: TraceSource, num_ranks: int) -> bool:
    """Whether the trace records home ranks that exist among `num_ranks` ranks.

    Homes of a deployment with more ranks say nothing about one with fewer: they are left aside.
    """
    return source.has_home and all(
        int(part["home"].max(initial=0)) < num_ranks for part in source.token_columns(["home"])
    )

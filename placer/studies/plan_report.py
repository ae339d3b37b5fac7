"""Everything that the page about a plan shows, as one document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.affinity import count_chunks
from placer.affinity.details import routing_details
from placer.evaluation import evaluate, homes_fit
from placer.placement import Placement
from placer.plan import Plan
from placer.planning import Settings
from placer.studies.fitting import judged
from placer.studies.flows import flows
from placer.trace.source import TraceSource

if TYPE_CHECKING:
    from placer.cost import ReplicaPolicy

FORMAT = "placer.report"
SCHEMA_VERSION = 1
MOST_LABELS = 10


def report_document(
    plan: Plan,
    baselines: Mapping[str, Placement],
    part: TraceSource,
    *,
    scope: str,
    replica_policy: ReplicaPolicy,
    batch_tokens: int = 256,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """A plan beside baselines on the tokens that judge it.

    Args:
        plan: the plan.
        baselines: name -> placement; the first one is what plots compare with.
        part: the tokens that judge it, from `placer.planning.judging_part`.
        scope: what these tokens are to the plan.
        replica_policy: which copy serves a token.
        batch_tokens: of batches, where the trace records no forward passes.
        progress: told what is being done.
    """
    seed = int(plan.provenance.get("seed", 0))
    progress("replaying")
    evaluation = evaluate(
        plan.placement,
        baselines,
        part,
        scope=scope,
        dispatch=plan.dispatch,
        replica_policy=replica_policy,
        batch_tokens=batch_tokens,
        seed=seed,
    ).to_document()
    first = next(iter(baselines))
    shown = {"plan": plan.placement, first: baselines[first]}
    settings = Settings(
        num_ranks=plan.placement.num_ranks,
        dispatch=plan.dispatch,
        replica_policy=replica_policy,
        seed=seed,
    )
    document: dict[str, Any] = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "plan": {
            name: value
            for name, value in plan.to_document().items()
            if name not in ("format", "schema_version", "prediction")
        },
        "step_time": plan.prediction.get("step_time"),
        "compared_with": first,
        "evaluation": evaluation,
    }
    progress("load and messages of every layer")
    document["layers"] = _layers(part, shown, settings, batch_tokens)
    progress("workloads")
    document["labels"] = _labels(part, shown, settings, first)
    progress("co-activation")
    document["example"] = _example(part, plan.placement)
    document["routing"] = routing_details(part, [plan.placement.num_ranks], progress)
    return document


def _layers(
    part: TraceSource, shown: Mapping[str, Placement], settings: Settings, batch_tokens: int
) -> dict[str, Any]:
    """Per layer: messages, imbalance, rank loads; per link: messages; per batch: imbalance."""
    from placer.cost import replay

    ignore_home = not homes_fit(part, settings.num_ranks)
    document: dict[str, Any] = {"layer_ids": part.layer_ids.tolist()}
    for name, placement in shown.items():
        rows = placement.for_rounds(part.layer_ids)
        found = replay(
            part.chunks(),
            rows,
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
            batch_tokens=batch_tokens,
            ignore_home=ignore_home,
        )
        sent = flows(
            part.chunks(),
            rows,
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
            batch_tokens=batch_tokens,
            ignore_home=ignore_home,
        )
        load = found.rank_load
        mean = load.mean(axis=1, keepdims=True)
        relative = np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)
        document[name] = {
            "messages": (sent.by_layer / sent.num_tokens).tolist(),
            "links": (sent.by_link / sent.num_tokens).tolist(),
            "rank_load": relative.round(4).tolist(),
            "batches": {
                how: None if batches is None else _quantiles(batches.imbalance[0])
                for how, batches in (
                    ("recorded", found.batches),
                    ("mixed", found.mixed_batches),
                )
            },
            "batches_of": {
                "recorded": found.batches.how,
                "mixed": None if found.mixed_batches is None else found.mixed_batches.how,
            },
        }
    return document


def _quantiles(values: np.ndarray[Any, Any]) -> list[float] | None:
    """101 quantiles of the batches' imbalance."""
    known = values[np.isfinite(values)]
    return np.quantile(known, np.linspace(0, 1, 101)).tolist() if known.size else None


def _labels(
    part: TraceSource, shown: Mapping[str, Placement], settings: Settings, first: str
) -> list[dict[str, Any]]:
    """The largest workloads, each judged alone."""
    requests_of: dict[str, list[int]] = {}
    for request, label in part.request_labels().items():
        requests_of.setdefault(label, []).append(request)
    if len(requests_of) < 2:
        return []
    parts = {label: part.filtered(requests=ids) for label, ids in requests_of.items()}
    largest = sorted(parts, key=lambda label: (-parts[label].num_tokens, label))[:MOST_LABELS]
    rows = []
    for label in largest:
        judge = judged(parts[label], shown, settings)
        rows.append(
            {
                "label": label,
                "requests": judge.num_requests,
                "tokens": judge.num_tokens,
                "plan": judge.figures("plan"),
                first: judge.figures(first),
                "change": judge.change("plan", first),
            }
        )
    return rows


def _example(part: TraceSource, placement: Placement) -> dict[str, Any]:
    """Co-activation of the layer whose experts' pairs the plan gathers most, as lift.

    `order` lists the experts rank by rank, the first copy of each.
    """
    counts = count_chunks(part.chunks(with_weights=False))
    pairs = counts.coactivation.astype(np.float64)
    diagonal = np.arange(placement.num_experts)
    pairs[:, diagonal, diagonal] = 0
    rows = placement.for_rounds(part.layer_ids)
    rank = rows.ranks_of_experts()[:, :, 0]
    same = rank[:, :, None] == rank[:, None, :]
    total = pairs.sum(axis=(1, 2))
    kept = np.divide((pairs * same).sum(axis=(1, 2)), total, out=np.zeros(total.shape),
                     where=total > 0)  # fmt: skip
    layer = int(kept.argmax())
    order = np.lexsort((diagonal, rank[layer]))
    return {
        "layer_id": int(part.layer_ids[layer]),
        "kept": float(kept[layer]),
        "kept_by_layer": kept.tolist(),
        "order": order.tolist(),
        "rank": rank[layer][order].tolist(),
        "pairs_per_token": (pairs[layer] / max(1, counts.num_tokens)).round(6).tolist(),
    }

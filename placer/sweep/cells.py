"""One plan of a sweep: solved on the requests to fit to, judged on the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from placer.errors import InfeasibleError, PlacerError
from placer.evaluation import homes_fit
from placer.placement import Placement, contiguous_like
from placer.planning import Settings, certificate_of, cluster_of, refuse_broken_cap
from placer.studies.fitting import Fitted, Halves, fit, halve
from placer.sweep.grid import Cell, Shape
from placer.timing import dims_for
from placer.trace.concat import concatenate
from placer.trace.memory import MemorySource
from placer.trace.source import TraceSource

FORMAT = "placer.sweep.cell"
SCHEMA_VERSION = 1

_FIGURES = (
    "span",
    "imbalance",
    "imbalance_mixed_batches_mean",
    "imbalance_mixed_batches_p95",
    "cross_rank_fraction",
)


@dataclass(frozen=True, eq=False)
class Workload:
    """What all cells share: a trace in two halves, and what is asked of every plan."""

    halves: Halves
    settings: Settings


def workload(sources: Sequence[TraceSource], settings: Settings) -> Workload:
    """Split the requests once; halves that are small enough are kept in memory.

    Args:
        sources: traces of one model.
        settings: phase, objective, solver, cap, seed, share held out; the shape does not matter.
    """
    source = concatenate(sources).filtered(phase=settings.phase)
    halves = halve(source, settings)
    if all(isinstance(each, MemorySource) for each in sources):
        halves = Halves(MemorySource(halves.fit.read()), MemorySource(halves.judge.read()))
    return Workload(halves, settings)


def run_job(shared: Workload, job: Sequence[Cell]) -> list[dict[str, Any]]:
    """Documents of the cells of a job. What is impossible becomes a cell that says why.

    Raises:
        KeyboardInterrupt: Ctrl-C during the search.
    """
    documents = []
    fitted: Fitted | None = None
    shape: Shape | None = None
    failed: PlacerError | None = None
    for cell in job:
        started = time.perf_counter()
        result = None
        try:
            if cell.shape != shape:
                shape, failed = cell.shape, None
                settings = _settings(shared, shape)
                fitted = fit(shared.halves.fit, settings, fitted)
                refuse_broken_cap(fitted.result, settings)
            if failed is None:
                assert fitted is not None
                result = _judge(shared, settings, fitted, cell.batch_tokens)
        except PlacerError as error:
            failed = error
        documents.append(
            {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "config": cell.config,
                "result": result,
                "error": None
                if failed is None
                else {"message": failed.message, "exit_code": failed.exit_code},
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
    return documents


def _settings(shared: Workload, shape: Shape) -> Settings:
    num_experts = shared.halves.fit.num_experts
    fewest = -(-num_experts // shape.num_ranks)
    if shape.spare_slots and fewest + shape.spare_slots > num_experts:
        raise InfeasibleError(
            f"{fewest} + {shape.spare_slots} slots per rank are more than {num_experts} experts"
        )
    settings = replace(
        shared.settings,
        num_ranks=shape.num_ranks,
        num_nodes=shape.num_nodes,
        slots_per_rank=fewest + shape.spare_slots,
        dispatch=shape.dispatch,
        cluster=shape.cluster or None,
    )
    if shape.dispatch == "allgather" and settings.objective == "traffic":
        settings = replace(settings, objective="balance", max_imbalance=None)
    return settings


def _judge(
    shared: Workload, settings: Settings, fitted: Fitted, batch_tokens: int
) -> dict[str, Any]:
    """Figures on held-out requests, beside contiguous placement."""
    from placer.cost import compare, measure, replay

    judge = shared.halves.judge
    ignore_home = not homes_fit(judge, settings.num_ranks)
    plan, contiguous = (
        replay(
            judge.chunks(),
            which.for_rounds(judge.layer_ids),
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
            batch_tokens=batch_tokens,
            ignore_home=ignore_home,
        )
        for which in (fitted.placement, contiguous_like(fitted.placement))
    )
    ours = measure(plan, seed=settings.seed).to_dict()
    theirs = measure(contiguous, num_resamples=0).to_dict()
    change = compare(plan, contiguous, seed=settings.seed)
    messages = f"messages_{'coherent' if settings.dispatch == 'coherent' else 'alltoall'}"
    names = (messages, f"node_{messages}", *_FIGURES)
    result = fitted.result
    document: dict[str, Any] = {
        "scope": "held-out",
        "modelled": True,
        "requests": plan.num_requests,
        "tokens": plan.num_tokens,
        "headline": "imbalance" if settings.dispatch == "allgather" else messages,
        "slots_per_rank": fitted.placement.slots_per_rank,
        "figures": {
            name: {
                **{key: ours[name][key] for key in ("value", "low", "high")},
                "contiguous": theirs[name]["value"],
                **{key: change[name][key] for key in ("change", "change_low", "change_high")},
            }
            for name in names
        },
        "certificate": {
            key: value
            for key, value in certificate_of(result, settings.objective).items()
            if key not in ("scope", "parts")
        },
        "step_time": _step_time(settings, fitted.placement, judge, batch_tokens, ignore_home),
    }
    return document


def _step_time(
    settings: Settings,
    placement: Placement,
    judge: TraceSource,
    batch_tokens: int,
    ignore_home: bool,
) -> dict[str, Any] | None:
    """Modelled microseconds of a batch; None without a cluster or without the model's size."""
    from placer.cost import Transport, step_time

    cluster = cluster_of(settings)
    if cluster is None:
        return None
    dims, kv_bytes = dims_for(settings.model, judge)
    plan, contiguous = (
        step_time(
            judge.chunks(),
            which.for_rounds(judge.layer_ids),
            cluster,
            dims=dims,
            transport=Transport(kv_bytes_per_token=kv_bytes),
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
            batch_tokens=batch_tokens,
            mixed_batches=True,
            ignore_home=ignore_home,
        ).summary()
        for which in (placement, contiguous_like(placement))
    )
    ours, theirs = plan["total_us"], contiguous["total_us"]
    return {
        "plan_us": ours,
        "contiguous_us": theirs,
        "change": ours / theirs - 1 if ours is not None and theirs else None,
        "missing": plan["missing"],
    }

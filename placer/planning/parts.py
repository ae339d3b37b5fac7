"""Which tokens a plan is fitted to, and which ones judge it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.plan import Plan
from placer.planning.settings import Settings
from placer.trace.concat import concatenate as concatenate_sources
from placer.trace.source import TraceSource
from placer.trace.split import split_requests

IN_MEMORY_BYTES = 1 << 29


@dataclass(frozen=True, eq=False)
class Parts:
    """A trace in two: what a plan is fitted to, and what judges it (the same when in-sample)."""

    fit: TraceSource
    judge: TraceSource
    scope: str
    inputs: list[dict[str, Any]]


def split_sources(sources: Sequence[TraceSource], settings: Settings) -> Parts:
    """Split every source by request with the settings' seed, and join the halves.

    Raises:
        UsageError: sources of different models, the same source twice, or one request only and not
            `in_sample`.
    """
    if not sources:
        raise UsageError("no trace was given")
    inputs: list[dict[str, Any]] = []
    fit, judge = [], []
    for source in sources:
        entry = {
            "name": source.path.name if source.path else None,
            "fingerprint": source.fingerprint(),
            "tokens": source.num_tokens,
        }
        if any(entry["fingerprint"] == other["fingerprint"] for other in inputs):
            raise UsageError(
                f"{source.name} holds the same tokens as another trace given",
                "give each trace once: twice, its tokens would count double",
            )
        inputs.append(entry)
        phased = source.filtered(phase=settings.phase)
        if settings.in_sample:
            fit.append(phased)
            continue
        split = split_requests(
            phased.request_ids(),
            seed=settings.seed,
            holdout=settings.holdout,
            labels=phased.request_labels(),
        )
        entry["fit_requests"] = digest_of(split.fit)
        fit.append(phased.filtered(requests=split.fit))
        judge.append(phased.filtered(requests=split.held_out))
    whole = concatenate_sources(fit)
    if settings.in_sample:
        return Parts(whole, whole, "in-sample", inputs)
    return Parts(whole, concatenate_sources(judge), "held-out", inputs)


def digest_of(requests: NDArray[np.int64]) -> str:
    """A short hex digest of request ids."""
    return hashlib.sha256(np.asarray(requests, "<i8").tobytes()).hexdigest()[:16]


def judging_part(
    source: TraceSource, plan: Plan, *, phase: str | None = None, all_requests: bool = False
) -> tuple[TraceSource, str]:
    """The tokens of `source` that judge `plan`, and what to call them.

    A trace that the plan never saw judges it as a whole ("unseen"). Of one that it was fitted to,
    the requests that it was not fitted to do ("held-out"), or all of them ("in-sample").

    Args:
        source: a trace of the plan's model.
        plan: says what it was fitted to, and how the requests were split.
        phase: the tokens' phase; by default the one that the plan was fitted to, if it was fitted
            to this trace, else both.
        all_requests: also those that it was fitted to.

    Raises:
        UsageError: another model's trace; or the split cannot be made again: the trace's labels are
            others by now.
        PlacerError: no token is left.
    """
    refuse_other_model(plan, source)
    provenance = plan.provenance
    inputs = {entry["fingerprint"]: entry for entry in provenance.get("inputs", [])}
    entry = inputs.get(source.fingerprint()) if inputs else None
    if entry is None:
        return source.filtered(phase=phase), "unseen"
    fitted_phase = provenance.get("settings", {}).get("phase")
    part = source.filtered(phase=phase or fitted_phase)
    split = provenance.get("split")
    if all_requests or not split or split["in_sample"]:
        return part, "in-sample"
    fitted = source.filtered(phase=fitted_phase)
    fit = split_requests(
        fitted.request_ids(),
        seed=split["seed"],
        holdout=split["holdout"],
        labels=fitted.request_labels(),
    ).fit
    if entry.get("fit_requests") != digest_of(fit):
        raise UsageError(
            f"which requests of {source.name} the plan was fitted to cannot be told: "
            "the trace holds the same tokens, but its labels are others",
            "give the trace that the plan was made from, or --all-requests (in-sample)",
        )
    return part.filtered(requests=np.setdiff1d(part.request_ids(), fit)), "held-out"


def refuse_other_model(plan: Plan, source: TraceSource) -> None:
    """Raise UsageError where the trace has other layers or experts than the plan."""
    layer_ids = tuple(np.unique(source.layer_ids).tolist())
    placement = plan.placement
    if layer_ids == plan.layer_ids and source.num_experts == placement.num_experts:
        return
    theirs, ours = (f"layer ids {ids[0]}..{ids[-1]}" for ids in (layer_ids, plan.layer_ids))
    raise UsageError(
        f"{source.name} has {len(layer_ids)} layers x {source.num_experts} experts ({theirs}), the "
        f"plan {placement.num_layers} x {placement.num_experts} ({ours})",
        "a plan can be judged only on a trace of its own model",
    )


def open_traces(paths: Sequence[Path]) -> list[TraceSource]:
    """Open native or interchange traces; those that are small enough are read into memory.

    Of several paths (`traces/*`) files of another kind, such as a README, are left out with a
    warning; what may be a damaged trace never is.
    """
    from placer.trace import MemorySource, may_be_trace, open_trace

    wanted = [path for path in paths if may_be_trace(path)] or paths
    sources: list[TraceSource] = []
    for path in wanted:
        source = open_trace(path)
        entries = source.num_tokens * source.num_layers * source.top_k
        if entries * (6 if source.has_weights else 2) <= IN_MEMORY_BYTES:
            kept = MemorySource(source.read(), path=source.path)
            kept.complete, kept.warnings = source.complete, source.warnings
            source = kept
        sources.append(source)
    left_out = [f"{path} is no trace and was left out" for path in paths if path not in wanted]
    if left_out:
        sources[0].warnings[:0] = left_out
    return sources

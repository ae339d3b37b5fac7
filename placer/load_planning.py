"""From a load record to a plan: balance is all that can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import UsageError
from placer.evaluation import FORMAT, SCHEMA_VERSION
from placer.placement import Placement, contiguous_like
from placer.plan import Plan
from placer.planning import (
    Progress,
    Settings,
    Stopwatch,
    certificate_of,
    check_solver,
    expert_groups,
    placement_of,
    ranks_per_node,
    refuse_broken_cap,
    run_solver,
    slots_needed,
    versions,
)
from placer.trace.load import WHY_NO_AFFINITY, LoadRecord, read_load
from placer.trace.split import check_holdout


def plan_from_load(
    record: LoadRecord, settings: Settings, progress: Progress = lambda _: None, *, name: str
) -> Plan:
    """Fit a plan to the earlier windows of a load record and judge it on the later ones.

    Windows are divided in time, not at random: neighbouring forward passes serve the same requests.

    Args:
        record: the load.
        settings: as for a trace; only the objective `balance` can be served.
        progress: told what is being done.
        name: of the file, for messages and provenance.

    Raises:
        UsageError: what is asked for needs tokens, or there is one window and not `in_sample`.
        InfeasibleError, TimeLimitError: as in `placer.planning.make_plan`.
    """
    from solvers import Budget, Problem, ctrl_c_stops

    watch = Stopwatch()
    _refuse_what_needs_tokens(settings, name)
    check_solver(settings.solver)
    fit, judge = _divide(record, settings, name)
    problem = Problem(
        load=fit.sum(axis=0).astype(np.float64),
        num_ranks=settings.num_ranks,
        slots_per_rank=slots_needed(
            record.num_experts, settings.num_ranks, settings.slots_per_rank
        ),
        ranks_per_node=ranks_per_node(settings.num_ranks, settings.num_nodes),
        dispatch=settings.dispatch,
        objective="balance",
        max_imbalance=settings.max_imbalance,
        num_groups=expert_groups(settings, record.num_layers, record.num_experts),
    )
    progress(f"solving with {settings.solver}")
    budget = Budget(settings.time_limit_s)
    with ctrl_c_stops(budget):
        result = run_solver(problem, settings, budget)
        refuse_broken_cap(result, settings)
        placement = placement_of(problem, result)
        return Plan(
            placement=placement,
            layer_ids=tuple(record.layer_ids.tolist()),
            dispatch=settings.dispatch,
            prediction=_prediction(placement, judge, settings),
            certificate=certificate_of(result, "balance"),
            provenance={
                "inputs": [
                    {
                        "name": name,
                        "kind": "load",
                        "fingerprint": record.fingerprint(),
                        "windows": record.num_windows,
                        "fit_windows": len(fit),
                    }
                ],
                "solver": result.solver,
                "seed": settings.seed,
                "settings": asdict(settings) | {"expert_groups": problem.num_groups},
                "notes": [*result.notes, f"fitted to a load record: {WHY_NO_AFFINITY}"],
                "versions": versions(),
            },
            timings={
                "solve_s": round(result.seconds, 3),
                **watch.timings(),
            },
        )


def only_load(paths: Sequence[Path]) -> LoadRecord:
    """The load record among `paths`, which must be the only one of them."""
    if len(paths) > 1:
        raise UsageError(
            f"{len(paths)} files were given, a load record among them",
            "give one load record alone, or traces",
        )
    return read_load(paths[0])


def rank_load(placement: Placement, load: NDArray[Any]) -> NDArray[np.float64]:
    """[..., L, G] load of each rank, every expert's load shared evenly by its copies.

    Args:
        placement: where the experts are.
        load: [..., L, E].
    """
    table = placement.physical_to_logical
    num_layers, num_slots = table.shape
    layer = np.arange(num_layers)[:, None]
    copies = np.zeros((num_layers, placement.num_experts))
    np.add.at(copies, (np.broadcast_to(layer, table.shape)[table >= 0], table[table >= 0]), 1)
    per_copy = load / copies
    per_slot = np.where(table >= 0, per_copy[..., layer, np.maximum(table, 0)], 0.0)
    shape = (*per_slot.shape[:-1], placement.num_ranks, num_slots // placement.num_ranks)
    return np.asarray(per_slot.reshape(shape).sum(axis=-1))


def balance_figures(placement: Placement, load: NDArray[np.int64]) -> dict[str, Any]:
    """The figures of balance that windows of load [B, L, E] define, without intervals.

    Names and definitions are those of `placer.cost.definitions`; a window is a batch.
    """
    ranks = rank_load(placement, load)
    total = ranks.sum(axis=0)
    values = {
        "imbalance": float(_ratio(total.max(axis=-1), total.mean(axis=-1)).mean()),
        "balancedness": float(total.mean(axis=-1).sum() / total.max(axis=-1).sum()),
    }
    if len(load) > 1:
        windows = _ratio(ranks.max(axis=-1), ranks.mean(axis=-1)).mean(axis=-1)
        values["imbalance_batches_mean"] = float(windows.mean())
        values["imbalance_batches_p95"] = float(np.percentile(windows, 95))
    return {
        key: {"value": value, "low": None, "high": None, "unit": ""}
        for key, value in values.items()
    }


def _ratio(most: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """max / mean; a layer without load in a window is balanced."""
    return np.divide(most, mean, out=np.ones_like(mean), where=mean > 0)


def _prediction(
    placement: Placement, judge: NDArray[np.int64], settings: Settings
) -> dict[str, Any]:
    baseline = contiguous_like(placement)
    ours, theirs = balance_figures(placement, judge), balance_figures(baseline, judge)
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "scope": "in-sample" if settings.in_sample else "held-out",
        "modelled": True,
        "kind": "load",
        "windows": len(judge),
        "pairs": int(judge.sum()),
        "requests": 0,
        "tokens": 0,
        "dispatch": settings.dispatch,
        "replica_policy": "even",
        "metrics": ours,
        "baselines": {"contiguous": theirs},
        "change": {
            "contiguous": {
                key: {
                    "value": ours[key]["value"],
                    "baseline": theirs[key]["value"],
                    "change": ours[key]["value"] / theirs[key]["value"] - 1,
                    "change_low": None,
                    "change_high": None,
                }
                for key in ours
            }
        },
    }


def _divide(
    record: LoadRecord, settings: Settings, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[B', L, E] windows to fit to and windows that judge (the same when in-sample)."""
    if settings.in_sample:
        return record.load, record.load
    check_holdout(settings.holdout)
    if record.num_windows < 2:
        raise UsageError(
            f"{name} holds one window of load; to judge a plan on load that it was not fitted to "
            "takes two or more",
            "record several windows, or --in-sample to judge it on the load it was fitted to",
        )
    held_out = min(max(round(record.num_windows * settings.holdout), 1), record.num_windows - 1)
    return record.load[:-held_out], record.load[-held_out:]


def _refuse_what_needs_tokens(settings: Settings, name: str) -> None:
    if settings.objective != "balance":
        raise UsageError(
            f"{name} is a load record: {WHY_NO_AFFINITY}", "--objective balance is possible"
        )
    for option, given in {
        "--phase": settings.phase is not None,
        "--cluster": settings.cluster is not None,
        "--robust": settings.robust is not None,
        "--slot-budget": settings.slot_budget is not None,
        "--pin": bool(settings.pins),
        "--start": settings.start is not None,
        "--max-moves": settings.max_moves is not None,
        "--certify": settings.certify_s is not None,
    }.items():
        if given:
            raise UsageError(f"{option} needs a trace; {name} is a load record", f"leave {option}")

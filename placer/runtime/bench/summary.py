"""A bench's document: medians over repeats, predictions beside them, and how far off they are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from placer import __version__
from placer.runtime.bench.job import Arm, BenchJob, Way
from placer.runtime.bench.measuring import ALL_PARTS, PHASES
from placer.runtime.counters import PARTS

FORMAT = "placer.bench"
SCHEMA_VERSION = 1
_MODELLED = (*PARTS, "context")
_COUNTS = ("messages", "hidden_bytes", "routing_bytes", "kv_bytes", "pairs")
_ALSO_COUNTED = ("control_bytes", "collectives", "imbalance")

Measured = dict[str, Any]


def put_together(
    job: BenchJob,
    recorded: dict[str, tuple[Measured, dict[str, Any]]],
    repeats: Sequence[dict[str, Measured]],
    num_new: int,
) -> dict[str, Any]:
    """The document.

    Args:
        job: what was asked for.
        recorded: arm -> what its recorded warm-up counted, and what is predicted for its tokens.
        repeats: each arm -> what was measured.
        num_new: repeats that were made by this run; the others were found.
    """
    names = [arm.name for arm in job.arms]
    arms = {}
    for arm in job.arms:
        runs = [repeat[arm.name] for repeat in repeats]
        rest = _rest_of(arm.way, job, repeats)
        arms[arm.name] = _arm(arm, runs, *recorded[arm.name], rest)
    for name in names[1:]:
        arms[name]["plan_against_it"] = _factor(
            arms["plan"], arms[name], [r["plan"] for r in repeats], [r[name] for r in repeats],
            PHASES if job.max_new_tokens > 1 else PHASES[:1],
        )  # fmt: skip
    first = repeats[0]["plan"]["tokens"]
    for name in names:
        arms[name]["same_tokens_as_plan"] = repeats[0][name]["tokens"] == first
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "plan": job.plan_name,
        **{key: value for key, value in job.settings().items() if key != "arms"},
        "prompt_tokens": recorded["plan"][1]["tokens"]
        - len(job.prompts) * (job.max_new_tokens - 1),
        "repeats": len(repeats),
        "repeats_made_now": num_new,
        "warm_ups": job.warm_ups,
        "cluster": None if job.cluster is None else job.cluster.name,
        "plan_prediction": _own_prediction(job, repeats[0]["plan"], recorded["plan"][1]["tokens"]),
        "arms": arms,
    }


def _rest_of(way: Way, job: BenchJob, repeats: Sequence[dict[str, Measured]]) -> dict[str, float]:
    """Seconds of each phase that are not modelled: the median over all placements under a way.

    They do not depend on the placement.
    """
    names = [arm.name for arm in job.arms if arm.way == way]
    return {
        phase: median(
            repeat[name]["seconds_by_phase"][phase]["rest"] for repeat in repeats for name in names
        )
        for phase in PHASES
    }


def _arm(
    arm: Arm,
    runs: Sequence[Measured],
    warm: Measured,
    predicted: dict[str, Any],
    rest: dict[str, float],
) -> dict[str, Any]:
    middle = {
        key: median(run[key] for run in runs)
        for key in ("tokens_per_second", "wall_seconds", "prefill_seconds", "decode_seconds")
    }
    rates = [run["tokens_per_second"] for run in runs]
    seconds = {part: median(run["seconds"][part] for run in runs) for part in ALL_PARTS}
    phases = {
        phase: {part: median(run["seconds_by_phase"][phase][part] for run in runs)
                for part in ALL_PARTS}
        for phase in PHASES
    }  # fmt: skip
    layers = {
        part: [
            median(layer)
            for layer in zip(*(run["seconds_by_layer"][part] for run in runs), strict=True)
        ]
        for part in PARTS
    }
    measured = {
        **middle,
        "tokens_per_second_range": [min(rates), max(rates)],
        "seconds": seconds,
        "seconds_by_phase": phases,
        "seconds_by_layer": layers,
        **{key: runs[0][key] for key in (*_COUNTS, *_ALSO_COUNTED)},
    }
    return {
        "dispatch": arm.way.name,
        "rest_seconds": rest,
        "measured": measured,
        "predicted": predicted,
        "repeats_counted_the_same": all(
            run[key] == warm[key] for run in runs for key in (*_COUNTS, "tokens")
        ),
        "exact": {key: _agrees(measured[key], predicted[key]) for key in _COUNTS},
        "error": _errors(measured, predicted, rest),
    }


def _agrees(measured: Any, predicted: Any) -> bool:
    """Whether all that is predicted was counted."""
    if isinstance(predicted, dict):
        return all(measured[key] == value for key, value in predicted.items())
    return bool(measured == predicted)


def _errors(
    measured: Measured, predicted: dict[str, Any], rest: dict[str, float]
) -> dict[str, float] | None:
    """(predicted - measured) / measured of each part, of what is modelled, of all."""
    if predicted["seconds"] is None:
        return None
    found = {
        part: _relative(predicted["seconds"][part], measured["seconds"][part]) for part in _MODELLED
    }
    modelled = sum(predicted["seconds"].values())
    found["modelled"] = _relative(modelled, _modelled_of(measured))
    found["wall"] = _relative(modelled + sum(rest.values()), measured["wall_seconds"])
    return found


def _relative(predicted: float, measured: float) -> float:
    return predicted / measured - 1


def _factor(
    plan: dict[str, Any],
    other: dict[str, Any],
    plan_runs: Sequence[Measured],
    other_runs: Sequence[Measured],
    phases: Sequence[str],
) -> dict[str, Any]:
    """How many times as fast as the other the plan is; repeats are compared in pairs.

    Of all, and of each phase. `predicted` adds the measured rest to the modelled time of either;
    `predicted_of_modelled` is of the modelled time alone, `measured_of_modelled` of the same parts,
    measured.
    """

    def against(clock: str, phases: Sequence[str]) -> dict[str, Any]:
        ratios = [b[clock] / a[clock] for a, b in zip(plan_runs, other_runs, strict=True)]
        found: dict[str, Any] = {
            "measured": median(ratios),
            "measured_range": [min(ratios), max(ratios)],
            "predicted": None,
            "error": None,
        }
        if plan["predicted"]["seconds"] is not None:
            found["predicted"] = _predicted_of(other, phases) / _predicted_of(plan, phases)
            found["error"] = _relative(found["predicted"], found["measured"])
        return found

    parts = [_modelled_of(b) / _modelled_of(a) for a, b in zip(plan_runs, other_runs, strict=True)]
    ours, theirs = plan["predicted"]["seconds"], other["predicted"]["seconds"]
    return {
        **against("wall_seconds", phases),
        "measured_of_modelled": median(parts),
        "predicted_of_modelled": None
        if ours is None
        else sum(theirs.values()) / sum(ours.values()),
        "by_phase": {phase: against(f"{phase}_seconds", [phase]) for phase in phases},
    }


def _predicted_of(arm: dict[str, Any], phases: Sequence[str]) -> float:
    """Seconds: what is modelled, and the measured rest."""
    modelled = arm["predicted"]["seconds_by_phase"]
    found: float = sum(sum(modelled[p].values()) + arm["rest_seconds"][p] for p in phases)
    return found


def _modelled_of(run: Measured) -> float:
    return sum(float(run["seconds"][part]) for part in _MODELLED)


def _own_prediction(job: BenchJob, measured: Measured, tokens: int) -> dict[str, Any] | None:
    """What the plan promised of tokens that it was not fitted to, beside what was measured.

    Only for messages under `alltoall` without node-level copies, whose definition is the counters'.
    """
    metrics = job.plan.prediction.get("metrics", {})
    if job.arms[0].way.name != "alltoall" or "messages_alltoall" not in metrics:
        return None
    promised = metrics["messages_alltoall"]
    sent = measured["dispatch_messages"]
    found = (sent["same_node"] + sent["other_node"]) / (tokens * job.plan.placement.num_layers)
    return {
        "metric": "messages_alltoall",
        "scope": job.plan.prediction.get("scope"),
        **{key: promised.get(key) for key in ("value", "low", "high")},
        "measured": found,
        "error": _relative(promised["value"], found),
    }

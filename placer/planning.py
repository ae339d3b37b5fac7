"""From traces to a plan: split, count, solve, judge on the tokens that were held out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from placer import __version__
from placer.cluster import Cluster, fits, load_cluster
from placer.cost.order import concatenate
from placer.errors import InfeasibleError, PlacerError, TimeLimitError, UsageError
from placer.evaluation import evaluate, homes_fit
from placer.placement import Placement, contiguous_like
from placer.plan import Dispatch, Plan
from placer.timing import TimingOptions, dims_for, step_times
from placer.trace.concat import concatenate as concatenate_sources
from placer.trace.model import ModelDims, Trace
from placer.trace.rounds import one_row_per_layer
from placer.trace.source import TraceSource
from placer.trace.split import scramble, split_requests

if TYPE_CHECKING:
    from placer.cost import ReplicaPolicy
    from solvers import Budget, Problem, Result

DEFAULT_MAX_IMBALANCE = 1.10
DEFAULT_NODE_WEIGHT = 4.0
PROFILE_TOKENS = 32768
ELEMENT_BYTES = 2  # of a hidden state in bfloat16
IN_MEMORY_BYTES = 1 << 29
CAPPED_SOLVERS = ("auto", "local_search")

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
        kv_tokens, reserve: see `placer.models.memory_of`; with `model` and `cluster`.
        replica_policy: how a token chooses among copies when the plan is judged.
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
    kv_tokens: int = 0
    reserve: float = 0.1
    replica_policy: ReplicaPolicy = "local"


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
            raise UsageError(f"{source.name} holds the same tokens as another trace given")
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
        UsageError: the split cannot be made again: the trace's labels are others by now.
        PlacerError: no token is left.
    """
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


def sample_tokens(source: TraceSource, most: int) -> Trace:
    """About `most` tokens of `source`: one of every run of equally many, drawn without a pattern.

    Tokens of decode passes come in the order of the batch, so a fixed stride could meet the same
    few requests again and again. The draw depends on the token's place alone.
    """
    stride = max(1, -(-source.num_tokens // most))
    kept: list[Trace] = []
    seen = 0
    for chunk in source.chunks():
        run, place = np.divmod(np.arange(seen, seen + chunk.num_tokens), stride)
        drawn = scramble(run, seed=0) % np.uint64(stride)
        kept.append(chunk.select(place.astype(np.uint64) == drawn))
        seen += chunk.num_tokens
    return concatenate(kept)


def slots_needed(num_experts: int, num_ranks: int, slots_per_rank: int | None) -> int:
    """Slots per rank: what the user said, or the fewest that hold every expert.

    Raises:
        UsageError: ranks do not divide the experts and no slots were given.
        InfeasibleError: too few slots.
    """
    fewest = -(-num_experts // num_ranks)
    if slots_per_rank is None:
        if num_experts % num_ranks:
            raise UsageError(
                f"{num_ranks} ranks do not divide {num_experts} experts",
                f"--slots-per-rank {fewest} leaves {fewest * num_ranks - num_experts} slots for "
                "replicas or empty; or give a number of ranks that divides the experts",
            )
        return fewest
    if slots_per_rank < fewest:
        raise InfeasibleError(
            f"{num_ranks} ranks x {slots_per_rank} slots cannot hold {num_experts} experts",
            f"--slots-per-rank {fewest} or more",
        )
    return min(slots_per_rank, num_experts)


def cluster_of(settings: Settings) -> Cluster | None:
    """The cluster that the settings name, with their nodes and ranks."""
    if settings.cluster is None:
        return None
    return load_cluster(
        settings.cluster,
        num_nodes=settings.num_nodes,
        ranks_per_node=settings.num_ranks // settings.num_nodes,
    )


def prices(
    settings: Settings, cluster: Cluster | None, model: ModelDims
) -> tuple[float, float, float]:
    """What the objective pays: node weight, us of a pair in an expert, us of a message.

    A message carries a hidden state there and its result back over a rank's fast link; a message
    between nodes costs as much more as the network is slower.

    Raises:
        UsageError: objective latency without a cluster, or without the model's dimensions.
    """
    node_weight = DEFAULT_NODE_WEIGHT if settings.node_weight is None else settings.node_weight
    if cluster is not None and settings.node_weight is None:
        shared = cluster.ranks_per_node if cluster.inter_node_scope == "node" else 1
        node_weight = cluster.intra_node_gbps / (cluster.inter_node_gbps / shared)
    if settings.num_nodes == 1:
        node_weight = 0.0
    if settings.objective != "latency":
        return node_weight, 0.0, 0.0
    if cluster is None:
        raise UsageError("objective latency needs to know the cluster", "--cluster h100-nvl8")
    missing = [
        name
        for name, value in {
            "hidden_size": model.hidden_size,
            "expert_flops_per_token": model.expert_flops_per_token,
            "flops of the cluster": cluster.flops,
        }.items()
        if value is None
    ]
    if missing:
        raise UsageError(
            f"objective latency needs {', '.join(missing)}, which the trace or cluster lacks",
            "trace with `placer trace`, add the keys to the npz (docs/traces.md), or use traffic",
        )
    assert model.hidden_size is not None
    assert model.expert_flops_per_token is not None
    assert cluster.flops is not None
    message_us = 2 * model.hidden_size * ELEMENT_BYTES / (cluster.intra_node_gbps * 1e3)
    return node_weight, model.expert_flops_per_token / cluster.flops * 1e6, message_us


def build_problem(source: TraceSource, settings: Settings, progress: Progress) -> Problem:
    """Count the tokens to fit to and put the solvers' problem together."""
    from placer.affinity import count_chunks
    from solvers import Problem

    source = one_row_per_layer(source)
    if settings.num_ranks % settings.num_nodes:
        raise UsageError(
            f"{settings.num_nodes} nodes do not divide {settings.num_ranks} GPUs",
            "every node holds the same number of GPUs",
        )
    slots = slots_needed(source.num_experts, settings.num_ranks, settings.slots_per_rank)
    cluster = cluster_of(settings)
    dims, _ = dims_for(settings.model, source)
    if cluster is not None:
        refuse_too_little_memory(settings, cluster, dims, source.num_layers, slots)
    node_weight, load_us, message_us = prices(settings, cluster, dims)
    progress("counting load, co-activation and affinity")
    counts = count_chunks(source.chunks())
    progress("sampling tokens for the exact objective")
    sample = sample_tokens(source, settings.profile_tokens)
    recorded = homes_fit(source, settings.num_ranks)
    home = sample.home if recorded and sample.home is not None else sample.request
    return Problem(
        load=counts.load.astype(np.float64),
        num_ranks=settings.num_ranks,
        slots_per_rank=slots,
        ranks_per_node=settings.num_ranks // settings.num_nodes,
        coactivation=counts.coactivation.astype(np.float64),
        affinity=counts.affinity,
        primary_affinity=counts.primary_affinity.astype(np.float64),
        tokens=sample.experts,
        primary=sample.primary(),
        home=home % settings.num_ranks,
        dispatch=settings.dispatch,
        objective=settings.objective,  # type: ignore[arg-type]
        max_imbalance=settings.max_imbalance,
        node_weight=node_weight,
        latency_load_us=load_us,
        latency_message_us=message_us,
    )


def refuse_too_little_memory(
    settings: Settings, cluster: Cluster, dims: ModelDims, num_layers: int, slots: int
) -> None:
    """Raise InfeasibleError when a rank cannot hold its slots.

    With a named model everything counts (`placer.models.check_memory`), else only the experts.
    """
    if settings.model is not None:
        from placer.models import check_memory, load_shape

        shape = load_shape(settings.model)
        check_memory(shape, cluster, slots, kv_tokens=settings.kv_tokens, reserve=settings.reserve)
    elif dims.expert_bytes is not None:
        fits(cluster, num_layers=num_layers, slots_per_rank=slots, expert_bytes=dims.expert_bytes)


def check_solver(name: str) -> None:
    """Raise UsageError when no solver is called `name`."""
    import solvers

    try:
        solvers.get(name)
    except ValueError as error:
        what, _, known = str(error).partition("; ")
        raise UsageError(what, known) from None


def run_solver(problem: Problem, settings: Settings, budget: Budget | None = None) -> Result:
    """Solve; the solvers' errors become placer's.

    Raises:
        InfeasibleError, TimeLimitError, UsageError: from the solver.
        KeyboardInterrupt: Ctrl-C before there was a placement.
    """
    import solvers

    budget = budget or solvers.Budget(settings.time_limit_s)
    try:
        return solvers.solve(problem, settings.solver, seed=settings.seed, budget=budget)
    except solvers.InfeasibleProblem as error:
        raise InfeasibleError(str(error)) from error
    except solvers.NoSolutionFound as error:
        if budget.interrupted:
            raise KeyboardInterrupt from error
        raise TimeLimitError(str(error), "give a longer --time-limit") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def refuse_broken_cap(result: Result, settings: Settings) -> None:
    """Raise what a result that breaks the cap on imbalance means, if it does.

    A cap that nobody asked for refuses nothing.
    """
    import solvers

    if result.status != "infeasible" or settings.cap_is_default:
        return
    found = (
        f"imbalance at most {settings.max_imbalance}; the least that {settings.solver} found is "
        f"{solvers.capped_imbalance(result.parts):.4f}"
    )
    looser = "a higher --max-imbalance (none lifts it), or another slot per rank for replicas"
    if result.termination == "time_limit":
        raise TimeLimitError(
            f"the time limit passed before there was a placement with {found}",
            f"a longer --time-limit, {looser}",
        )
    if result.termination == "interrupted":
        raise PlacerError(f"interrupted before there was a placement with {found}")
    raise InfeasibleError(f"no placement was found with {found}", looser)


def make_plan(
    sources: Sequence[TraceSource], settings: Settings, progress: Progress = lambda _: None
) -> Plan:
    """Fit a plan to one part of the requests and predict its figures on the other.

    Raises:
        InfeasibleError: the cap on imbalance cannot be kept; nothing is returned.
        TimeLimitError: no placement that keeps it within the time limit.
    """
    started = time.perf_counter()
    check_solver(settings.solver)
    progress("splitting the requests")
    parts = split_sources(sources, settings)
    problem = build_problem(parts.fit, settings, progress)
    progress(f"solving with {settings.solver}")
    result = run_solver(problem, settings)
    refuse_broken_cap(result, settings)
    progress(f"replaying the {parts.scope} tokens")
    return plan_of_result(result, problem, parts, settings, time.perf_counter() - started)


def placement_of(problem: Problem, result: Result) -> Placement:
    """The result's table as a `Placement`."""
    return Placement(
        result.placement, problem.num_experts, problem.num_ranks, problem.ranks_per_node
    )


def plan_of_result(
    result: Result, problem: Problem, parts: Parts, settings: Settings, seconds: float
) -> Plan:
    """Judge the result on the parts' tokens and write down where it came from.

    A result that breaks only the default cap is feasible: nobody asked for the cap.
    """
    placement = placement_of(problem, result)
    baseline = contiguous_like(placement)
    evaluation = evaluate(
        placement,
        {"contiguous": baseline},
        parts.judge,
        scope=parts.scope,
        dispatch=settings.dispatch,
        replica_policy=settings.replica_policy,
        seed=settings.seed,
    )
    asked = asdict(settings)
    return Plan(
        placement=placement,
        layer_ids=tuple(int(i) for i in np.unique(parts.fit.layer_ids)),
        model=dims_for(settings.model, parts.fit)[0],
        dispatch=settings.dispatch,
        prediction=evaluation.to_document()
        | modelled_step_times(placement, baseline, parts, settings),
        certificate={
            "scope": "fit",
            "objective": settings.objective,
            "value": result.objective,
            "bound_of": result.bound_of,
            "lower_bound": result.lower_bound,
            "gap": result.gap,
            "status": "feasible" if result.status == "infeasible" else result.status,
            "termination": result.termination,
            "parts": result.parts,
        },
        provenance={
            "inputs": parts.inputs,
            "split": {
                "by": "request",
                "holdout": settings.holdout,
                "seed": settings.seed,
                "in_sample": settings.in_sample,
            },
            "solver": result.solver,
            "seed": settings.seed,
            "settings": asked,
            "notes": result.notes,
            "versions": versions(),
        },
        timings={"solve_s": round(result.seconds, 3), "total_s": round(seconds, 3)},
    )


def modelled_step_times(
    placement: Placement, baseline: Placement, parts: Parts, settings: Settings
) -> dict[str, Any]:
    """Modelled step time of the plan and of the baseline; nothing without a cluster."""
    if settings.cluster is None:
        return {}
    options = TimingOptions(cluster=settings.cluster, model=settings.model)
    return {
        "step_time": step_times(
            {"plan": placement, "contiguous": baseline},
            parts.judge,
            options,
            dispatch=settings.dispatch,
            replica_policy=settings.replica_policy,
        )
    }


def versions() -> dict[str, str]:
    """Versions of what a plan's bytes may depend on."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("numpy", "numba", "scipy", "ortools")}
    return {"placer": __version__, **found}


def open_traces(paths: Sequence[Path]) -> list[TraceSource]:
    """Open native or interchange traces; those that are small enough are read into memory."""
    from placer.trace import MemorySource, open_trace

    sources: list[TraceSource] = []
    for path in paths:
        source = open_trace(path)
        entries = source.num_tokens * source.num_layers * source.top_k
        if entries * (6 if source.has_weights else 2) <= IN_MEMORY_BYTES:
            kept = MemorySource(source.read(), path=source.path)
            kept.complete, kept.warnings = source.complete, source.warnings
            source = kept
        sources.append(source)
    return sources

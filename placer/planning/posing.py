"""From tokens to the solvers' problem."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from placer.cost.order import concatenate
from placer.errors import InfeasibleError, UsageError
from placer.evaluation import homes_fit
from placer.plan import read_plan
from placer.planning.pricing import (
    cluster_of,
    link_cost,
    prices,
    rank_slots,
    rank_speed,
    ranks_per_node,
    refuse_too_little_memory,
    slots_needed,
)
from placer.planning.scenarios import Scenarios, batch_numbers, batch_scenarios, request_scenarios
from placer.planning.settings import Progress, Settings
from placer.timing import dims_for, shape_for
from placer.trace.model import Trace
from placer.trace.rounds import one_row_per_layer
from placer.trace.source import TraceSource, listing
from placer.trace.split import scramble

if TYPE_CHECKING:
    from solvers import Problem

PIN = re.compile(r"(?:(\d+):)?(\d+)@(\d+)")
PIN_HINT = "EXPERT@RANK or LAYER:EXPERT@RANK, for example 3@0 or 12:3@0"


def sample_tokens(source: TraceSource, most: int) -> Trace:
    """About `most` tokens of `source`: one of every run of equally many, drawn without a pattern.

    Tokens of decode passes come in the order of the batch, so a fixed stride could meet the same
    few requests again and again. The draw depends on the token's place alone.
    """
    return _sample(source, most)[0]


def _sample(source: TraceSource, most: int) -> tuple[Trace, NDArray[np.int64]]:
    """`sample_tokens`, and the place of each token in the source."""
    stride = max(1, -(-source.num_tokens // most))
    kept: list[Trace] = []
    places: list[NDArray[np.int64]] = []
    seen = 0
    for chunk in source.chunks():
        place = np.arange(seen, seen + chunk.num_tokens)
        run, inside = np.divmod(place, stride)
        drawn = inside.astype(np.uint64) == scramble(run, seed=0) % np.uint64(stride)
        kept.append(chunk.select(drawn))
        places.append(place[drawn])
        seen += chunk.num_tokens
    return concatenate(kept), np.concatenate(places)


def build_problem(source: TraceSource, settings: Settings, progress: Progress) -> Problem:
    """Count the tokens to fit to and put the solvers' problem together."""
    from placer.affinity import count_chunks
    from solvers import InfeasibleProblem, Problem

    source = one_row_per_layer(source)
    per_node = ranks_per_node(settings.num_ranks, settings.num_nodes)
    slots = slots_needed(source.num_experts, settings.num_ranks, settings.slots_per_rank)
    cluster = cluster_of(settings)
    dims, _ = dims_for(settings.model, source)
    room = None
    if cluster is not None:
        room = rank_slots(settings, cluster, dims, source.num_layers, slots)
        if room is None:
            refuse_too_little_memory(settings, cluster, dims, source.num_layers, slots)
    node_weight, load_us, message_us = prices(settings, cluster, dims)
    progress("counting load, co-activation and affinity")
    counts = count_chunks(source.chunks())
    progress("sampling tokens for the exact objective")
    sample, scenarios = _tokens(source, settings)
    recorded = homes_fit(source, settings.num_ranks)
    home = sample.trace.home if recorded and sample.trace.home is not None else sample.trace.request
    try:
        return Problem(
            load=counts.load.astype(np.float64),
            num_ranks=settings.num_ranks,
            slots_per_rank=slots,
            ranks_per_node=per_node,
            coactivation=counts.coactivation.astype(np.float64),
            affinity=counts.affinity,
            primary_affinity=counts.primary_affinity.astype(np.float64),
            tokens=sample.trace.experts,
            primary=sample.trace.primary(),
            home=home % settings.num_ranks,
            batch=sample.batch,
            dispatch=settings.dispatch,
            objective=settings.objective,  # type: ignore[arg-type]
            max_imbalance=settings.max_imbalance,
            node_weight=node_weight,
            num_groups=expert_groups(settings, source.num_layers, source.num_experts),
            latency_load_us=load_us,
            latency_message_us=message_us,
            scenario_load=None if scenarios is None else scenarios.load,
            folds=scenarios is not None and scenarios.folds,
            scenario=sample.scenario,
            workload=None if scenarios is None else scenarios.workload,
            robust=settings.robust or "mean",
            rank_speed=None if cluster is None else rank_speed(cluster),
            rank_slots=room,
            slot_budget=settings.slot_budget,
            pinned=pinned(
                settings.pins, source.layer_ids.tolist(), source.num_experts, settings.num_ranks
            ),
            current=current(settings, source, slots),
            max_moves=settings.max_moves,
            link_cost=None if cluster is None else link_cost(cluster),
        )
    except InfeasibleProblem as error:
        raise InfeasibleError(str(error)) from error


@dataclass(frozen=True, eq=False)
class _Sample:
    """Tokens that the problem is posed on, in the order of their batches.

    Attributes:
        trace: the tokens.
        batch: [T] batch of each, non-decreasing.
        scenario: [T] scenario of each, or None.
    """

    trace: Trace
    batch: NDArray[np.int64]
    scenario: NDArray[np.int64] | None


def _tokens(source: TraceSource, settings: Settings) -> tuple[_Sample, Scenarios | None]:
    if settings.averaged_over == "batches":
        if settings.robust is not None:
            raise UsageError(
                "--robust balances workloads, --balance-over batches balances batches: not both",
                "leave one of them out",
            )
        found = batch_scenarios(source, settings)
        if found is not None and found.sample is not None and found.of_sample is not None:
            return _Sample(found.sample, found.of_sample, found.of_sample), found
    trace, place = _sample(source, settings.profile_tokens)
    batch = batch_numbers(source)[place]
    order: NDArray[Any] = np.argsort(batch, kind="stable")
    trace, batch = trace.select(order), batch[order]
    wanted = settings.averaged_over in ("requests", "workloads") or settings.robust is not None
    scenarios = request_scenarios(source, settings) if wanted else None
    scenario = None if scenarios is None else scenarios.of(trace.request)
    if scenarios is not None and scenario is not None and scenarios.workload is not None:
        unseen = np.setdiff1d(scenarios.workload, scenarios.workload[scenario])
        if unseen.size:
            raise UsageError(
                f"workload {scenarios.names[unseen[0]]} has too few tokens beside the others: none "
                "is in the sample that the plan is fitted to",
                "leave it out, or trace more of it",
            )
    return _Sample(trace, batch, scenario), scenarios


def expert_groups(settings: Settings, num_layers: int, num_experts: int) -> int:
    """Groups of the router: what the user said, or those of the named model, or one.

    Raises:
        UsageError: they do not divide the experts, or the model has other layers or experts.
    """
    groups = settings.expert_groups
    if groups is None and settings.model is not None:
        groups = shape_for(settings.model, num_layers, num_experts).num_expert_groups
    groups = groups or 1
    if num_experts % groups:
        raise UsageError(
            f"{groups} expert groups do not divide {num_experts} experts",
            "every group holds the same number of experts; n_group in a model's config.json",
        )
    return groups


def pinned(
    pins: Sequence[str], layer_ids: list[int], num_experts: int, num_ranks: int
) -> NDArray[np.int64] | None:
    """[L, E] rank of each pin, -1 elsewhere; None without pins.

    Args:
        pins: "expert@rank" (in every layer) or "layer:expert@rank".
        layer_ids: [L] real layer numbers.

    Raises:
        UsageError: a pin that cannot be read, names no layer, expert or rank of the plan, or
            contradicts an earlier one.
    """
    if not pins:
        return None
    table = np.full((len(layer_ids), num_experts), -1, np.int64)
    for pin in pins:
        match = PIN.fullmatch(pin.replace(" ", ""))
        if match is None:
            raise UsageError(f"cannot read the pin {pin!r}", PIN_HINT)
        layer, expert, rank = match.groups()
        if int(expert) >= num_experts:
            raise UsageError(
                f"the pin {pin!r} names an expert beyond 0..{num_experts - 1}", PIN_HINT
            )
        if int(rank) >= num_ranks:
            raise UsageError(f"the pin {pin!r} names a rank beyond 0..{num_ranks - 1}", PIN_HINT)
        if layer is not None and int(layer) not in layer_ids:
            raise UsageError(
                f"the pin {pin!r} names a layer that the trace lacks",
                f"layers: {listing(layer_ids)}",
            )
        rows = slice(None) if layer is None else [layer_ids.index(int(layer))]
        if not np.isin(table[rows, int(expert)], (-1, int(rank))).all():
            raise UsageError(
                f"the pin {pin!r} contradicts another one: they name two ranks for expert {expert}",
                "an expert can be pinned to one rank per layer",
            )
        table[rows, int(expert)] = int(rank)
    return table


def current(settings: Settings, source: TraceSource, slots: int) -> NDArray[np.int64] | None:
    """[L, S] placement of the plan to start from, None without one.

    Raises:
        UsageError: it is for another model or number of ranks, or has more slots.
        BadFileError: from reading it.
    """
    if settings.start is None:
        if settings.max_moves is not None:
            raise UsageError("--max-moves counts moves from a plan", "name it by --start plan.json")
        return None
    plan = read_plan(Path(settings.start))
    placement = plan.placement
    expected = (source.num_layers, source.num_experts, settings.num_ranks)
    found = (placement.num_layers, placement.num_experts, placement.num_ranks)
    if found != expected:
        raise UsageError(
            f"{settings.start} has (layers, experts, ranks) {found}, this plan {expected}",
            "start from a plan of the same model and ranks",
        )
    if placement.slots_per_rank > slots:
        raise UsageError(
            f"{settings.start} has {placement.slots_per_rank} slots per rank, this plan {slots}",
            f"--slots-per-rank {placement.slots_per_rank}",
        )
    rows = placement.physical_to_logical.reshape(source.num_layers, settings.num_ranks, -1)
    spare = slots - placement.slots_per_rank
    padded = np.pad(rows, ((0, 0), (0, 0), (0, spare)), constant_values=-1)
    return padded.reshape(source.num_layers, -1).astype(np.int64)

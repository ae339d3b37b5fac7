"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from placer.errors import UsageError


class DispatchName(StrEnum):
    """How tokens travel."""

    alltoall = "alltoall"
    coherent = "coherent"
    allgather = "allgather"


class ObjectiveName(StrEnum):
    """What to minimise."""

    traffic = "traffic"
    balance = "balance"
    latency = "latency"
    affinity = "affinity"
    coactivation = "coactivation"


class PhaseName(StrEnum):
    """Part of a request's life."""

    prefill = "prefill"
    decode = "decode"


class BalanceOverName(StrEnum):
    """What imbalance is the mean of while solving."""

    requests = "requests"
    batches = "batches"
    workloads = "workloads"
    trace = "trace"


class RobustName(StrEnum):
    """What several workloads come to."""

    mean = "mean"
    worst = "worst"
    cvar = "cvar"


class ReplicaPolicyName(StrEnum):
    """Which copy of a replicated expert serves a token."""

    local = "local"
    round_robin = "round_robin"


JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Traces = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Traces: folders, or .npz files.")
]
OneTrace = Annotated[
    Path, typer.Argument(metavar="DIR", help="A trace: a folder, or an .npz file.")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Baselines = Annotated[
    list[str] | None,
    typer.Option("--baseline", help="contiguous, or another plan file; may be repeated."),
]
AllRequests = Annotated[
    bool,
    typer.Option("--all-requests", help="Also those that the plan was fitted to; labelled."),
]
BatchTokens = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="Batch size where the trace has no steps.")
]
Objective = Annotated[ObjectiveName, typer.Option("--objective", help="What to minimise.")]
SolverName = Annotated[str, typer.Option("--solver", help="auto, or a name from `placer doctor`.")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Ranks of the expert-parallel group.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Hosts that the GPUs are spread over.")]
SlotsPerRank = Annotated[
    int | None,
    typer.Option(
        "--slots-per-rank",
        min=1,
        help="Experts that a rank can hold per layer; more than experts / GPUs allows replicas.",
    ),
]
Dispatch = Annotated[DispatchName, typer.Option("--dispatch", help="How tokens travel.")]
MaxImbalance = Annotated[
    str | None,
    typer.Option(
        "--max-imbalance",
        metavar="X|none",
        help="Cap on max / mean rank load, averaged over layers and what --balance-over says; "
        "with replicas, of the load that ranks serve. "
        "Default: 1.10 for objective traffic; none lifts it.",
    ),
]
BalanceOver = Annotated[
    BalanceOverName | None,
    typer.Option(
        "--balance-over",
        help="What imbalance is averaged over: the requests without each of a few folds (what "
        "unseen ones will show), forward passes, workloads (labels, or traces), or the trace as "
        "a whole. Default: requests; trace for objective balance.",
    ),
]
Robust = Annotated[
    RobustName | None,
    typer.Option(
        "--robust",
        help="One plan for several workloads (traces given, or labels), each counting alike: "
        "their mean, the worst, or the mean of the worse half (cvar).",
    ),
]
Start = Annotated[
    Path | None, typer.Option("--start", help="A plan in use: the search starts there.")
]
MaxMoves = Annotated[
    int | None,
    typer.Option("--max-moves", min=0, help="Most expert copies moved against --start."),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="[LAYER:]EXPERT@RANK",
        help="Keep a copy of an expert on a rank, in one layer or in all. Repeatable.",
    ),
]
SlotBudget = Annotated[
    int | None,
    typer.Option(
        "--slot-budget",
        min=1,
        help="Most slots that a rank fills over all layers: layers that gain most from replicas "
        "get them, up to --slots-per-rank.",
    ),
]
Phase = Annotated[PhaseName | None, typer.Option("--phase", help="Use only this phase.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the split, search and bootstrap.")]
TimeLimit = Annotated[
    float | None, typer.Option("--time-limit", min=0.1, help="Seconds for the solver.")
]
Certify = Annotated[
    float | None,
    typer.Option(
        "--certify",
        min=0.1,
        metavar="SECONDS",
        help="Prove bounds on every figure for so long. Default: a few seconds' worth, on the "
        "objectives affinity and coactivation.",
    ),
]
Holdout = Annotated[
    float, typer.Option("--holdout", help="Share of the requests that judges the plan.")
]
InSample = Annotated[
    bool,
    typer.Option("--in-sample", help="Fit to all requests and judge on the same; labelled so."),
]
NodeWeight = Annotated[
    float | None,
    typer.Option(
        "--node-weight",
        min=0.0,
        help="Extra price of a message between nodes, in messages. "
        "Default: by the cluster's bandwidths, or 4.",
    ),
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="A preset (h100-nvl8, ...) or a TOML file: memory is checked, step time modelled.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|DIR",
        help="A model preset (deepseek-v3, ...) or a checkpoint's folder: its dimensions count "
        "instead of the trace's; all weights and KV are checked against memory.",
    ),
]
ExpertGroups = Annotated[
    int | None,
    typer.Option(
        "--expert-groups",
        min=1,
        help="Groups of consecutive experts that the model's router chooses among first (8 in "
        "DeepSeek-V3); eplb and sglang_vec keep a group on a node. Default: those of --model, "
        "or 1.",
    ),
]
KvTokens = Annotated[
    int,
    typer.Option("--kv-tokens", min=0, help="Tokens whose keys and values a rank keeps at once."),
]
Reserve = Annotated[
    float,
    typer.Option("--reserve", help="Share of a rank's memory that weights and KV cannot have."),
]
ReplicaPolicy = Annotated[
    ReplicaPolicyName,
    typer.Option("--replica-policy", help="Which copy of an expert serves a token."),
]


def refuse_kv_of_no_model(model: str | None, kv_tokens: int) -> None:
    """Raise UsageError where nobody knows how large the keys and values are."""
    if model is None and kv_tokens:
        raise UsageError("--kv-tokens needs to know the model", "--model deepseek-v3")


def parse_max_imbalance(text: str | None, objective: str, solver: str) -> float | None:
    """The cap that the user gave, or the default of the objective and solver."""
    from placer.planning import CAPPED_SOLVERS, DEFAULT_MAX_IMBALANCE

    if text is None:
        capped = objective == "traffic" and solver in CAPPED_SOLVERS
        return DEFAULT_MAX_IMBALANCE if capped else None
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"--max-imbalance {text!r} is not a number", "for example 1.10") from None
    if not 1.0 <= value < float("inf"):
        raise UsageError(
            f"--max-imbalance {text}: max / mean rank load is 1 or more", "for example 1.10"
        )
    return value


def numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is not a list of whole numbers", f"for example {option} 4,8"
        ) from None
    if min(found) < least:
        raise UsageError(f"{option} {text}: expected {least} or more", f"for example {option} 4,8")
    return found

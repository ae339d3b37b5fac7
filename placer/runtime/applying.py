"""Applying a plan: load, check, generate, and say what was measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from placer.errors import UsageError
from placer.plan import Dispatch, Plan
from placer.runtime.checks import check_memory, check_num_ranks, check_plan
from placer.runtime.context import RankContext
from placer.runtime.loading import local_slots, share_bytes
from placer.runtime.meeting import joined
from placer.runtime.moves import moves_between
from placer.runtime.rank import RankModel, Source, device_of, load_rank_model, open_source
from placer.tracer.prompts import Prompt, prompt_tokens


@dataclass(frozen=True)
class Job:
    """What every rank of a run is told.

    Attributes:
        plan: the plan.
        plan_name: for messages.
        folder: of the checkpoint.
        dispatch: how tokens travel.
        deduplicate_nodes: under `alltoall`, one copy of a token per other node.
        prompts: what to generate from; none only to load and check.
        max_new_tokens: of each prompt.
        batch_size: prompts that run together.
        dtype: "auto", float32, bfloat16 or float16.
        device: "auto", "cpu" or "cuda".
    """

    plan: Plan
    plan_name: str
    folder: Path
    dispatch: Dispatch
    deduplicate_nodes: bool = False
    prompts: tuple[Prompt, ...] = ()
    max_new_tokens: int = 32
    batch_size: int = 32
    dtype: str = "auto"
    device: str = "auto"


def apply_on_rank(context: RankContext, job: Job) -> dict[str, Any] | None:
    """What one rank does; rank 0 returns the document of the whole run."""
    import torch.distributed as dist
    import transformers

    transformers.logging.set_verbosity_error()
    placement = job.plan.placement
    check_num_ranks(placement, context.num_ranks)
    source = open_source(job.folder, job.dtype)
    check_plan(job.plan, source.layout, job.plan_name)
    device = device_of(context, job.device)
    hosted = context.ranks_of_host if device.type == "cpu" else [context.rank]
    check_memory(source.layout, placement, hosted, device)
    with joined(context, device) as transport:
        start = time.perf_counter()
        rank = load_rank_model(
            source, placement, transport, job.dispatch,
            deduplicate_nodes=job.deduplicate_nodes, check=True,
        )  # fmt: skip
        load_seconds = time.perf_counter() - start
        rank.counters.reset()
        requests, seconds = _generate(job, source, rank)
        num_experts = sum(
            len(local_slots(placement, i, context.rank)) for i in range(placement.num_layers)
        )
        own = {
            "rank": context.rank,
            "node": context.node,
            "device": str(device),
            "experts": num_experts,
            **asdict(rank.memory),
            "load_seconds": load_seconds,
            **seconds,
            "counters": rank.counters.document(),
        }
        everybody: list[Any] = [None] * context.num_ranks
        dist.all_gather_object(everybody, own)
    if context.rank:
        return None
    return {
        "plan": job.plan_name,
        "model": str(job.folder),
        "dispatch": job.dispatch,
        "deduplicate_nodes": job.deduplicate_nodes,
        "dtype": str(source.layout.dtype).removeprefix("torch."),
        "num_ranks": placement.num_ranks,
        "ranks_per_node": placement.ranks_per_node,
        "slots_checked": rank.num_checked,
        "ranks": everybody,
        "requests": requests,
    }


def plan_of_loading(
    plan: Plan, plan_name: str, folder: Path, dtype: str, against: Plan | None
) -> dict[str, Any]:
    """What ranks would load, and what moves against a plan in use; nothing is loaded.

    Raises:
        UsageError: the plan is for another model, or `against` for other ranks.
    """
    source = open_source(folder, dtype)
    check_plan(plan, source.layout, plan_name)
    placement = plan.placement
    document: dict[str, Any] = {
        "plan": plan_name,
        "model": str(folder),
        "dtype": str(source.layout.dtype).removeprefix("torch."),
        "num_ranks": placement.num_ranks,
        "ranks_per_node": placement.ranks_per_node,
        "expert_bytes": source.layout.expert_bytes,
        "other_bytes": source.layout.other_bytes,
        "ranks": [
            {
                "rank": rank,
                "node": rank // placement.ranks_per_node,
                "experts": (share - source.layout.other_bytes) // source.layout.expert_bytes,
                "share_bytes": share,
            }
            for rank in range(placement.num_ranks)
            for share in [share_bytes(source.layout, placement, rank)]
        ],
    }
    if against is not None:
        moves = moves_between(against.placement, placement, source.layout.expert_bytes)
        document["moves"] = moves.document()
    return document


def _generate(
    job: Job, source: Source, rank: RankModel
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Every prompt with its continuation, and the seconds that this rank measured."""
    seconds = {"prefill_seconds": 0.0, "decode_seconds": 0.0}
    if not job.prompts:
        return [], seconds
    tokenizer = tokenizer_of(job.folder)
    ids = [prompt_tokens(prompt, tokenizer, i) for i, prompt in enumerate(job.prompts)]
    stops = _stop_tokens(source.layout.model)
    made: list[Sequence[int]] = []
    for first in range(0, len(ids), job.batch_size):
        batch = ids[first : first + job.batch_size]
        found = rank.generator.generate(batch, job.max_new_tokens, stop_tokens=stops)
        made += found.tokens
        seconds["prefill_seconds"] += found.prefill_seconds
        seconds["decode_seconds"] += found.decode_seconds
    requests = [
        {
            "prompt": prompt.text,
            "prompt_tokens": len(given),
            "tokens": list(tokens),
            "text": tokenizer.decode(tokens, skip_special_tokens=True),
        }
        for prompt, given, tokens in zip(job.prompts, ids, made, strict=True)
    ]
    return requests, seconds


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer that is stored with a checkpoint.

    Raises:
        UsageError: there is none that can be loaded.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(
            f"{folder} has no tokenizer that can be loaded: {first}", "leave out the prompts"
        ) from None


def _stop_tokens(model: Any) -> frozenset[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])

"""What every rank does in a bench: load all arms, record one run of each, then repeat in turn."""

from __future__ import annotations

from typing import Any

import numpy as np

from placer.runtime.applying import tokenizer_of
from placer.runtime.bench.job import Arm, BenchJob
from placer.runtime.bench.measuring import Requests, record_once, run_once
from placer.runtime.bench.predicting import predict
from placer.runtime.bench.store import Store
from placer.runtime.bench.summary import put_together
from placer.runtime.checks import check_memory, check_num_ranks, check_plan
from placer.runtime.context import RankContext
from placer.runtime.context_cache import ContextBytes
from placer.runtime.meeting import joined
from placer.runtime.rank import RankModel, Source, device_of, load_rank_model, open_source
from placer.runtime.recording import Fragment, merge
from placer.trace.model import ModelDims
from placer.tracer.prompts import prompt_tokens


def bench_on_rank(context: RankContext, job: BenchJob) -> dict[str, Any] | None:
    """What one rank does; rank 0 returns the document of the whole bench."""
    import torch.distributed as dist
    import transformers

    transformers.logging.set_verbosity_error()
    check_num_ranks(job.plan.placement, context.num_ranks)
    source = open_source(job.folder, job.dtype)
    check_plan(job.plan, source.layout, job.plan_name)
    device = device_of(context, job.device)
    hosted = context.ranks_of_host if device.type == "cpu" else [context.rank]
    tokenizer = tokenizer_of(job.folder)
    requests = Requests(
        [prompt_tokens(prompt, tokenizer, i) for i, prompt in enumerate(job.prompts)],
        [i % context.num_ranks for i in range(len(job.prompts))],
        job.batch_size,
        job.max_new_tokens,
    )
    # only rank 0 looks into the folder: other hosts may not share it
    store = Store(job.output if context.rank == 0 else None, job.settings())
    with joined(context, device) as transport:
        loaded: dict[str, RankModel] = {}  # all stay, so that repeats can take turns
        ranks: list[tuple[Arm, RankModel]] = []
        for arm in job.arms:
            dispatch, by_node = arm.way.dispatch, arm.way.deduplicate_nodes
            if arm.placement_id in loaded:
                rank = loaded[arm.placement_id].under(dispatch, deduplicate_nodes=by_node)
            else:
                others = next(iter(loaded.values()), None)
                check_memory(source.layout, arm.placement, hosted, device,
                             holds_others=others is not None)  # fmt: skip
                rank = loaded[arm.placement_id] = load_rank_model(
                    source, arm.placement, transport, dispatch, deduplicate_nodes=by_node,
                    record=True, check=True, others=others,
                )  # fmt: skip
            ranks.append((arm, rank))
        recorded = {}
        for arm, rank in ranks:
            measured, fragments = record_once(rank, transport, requests)
            if context.rank == 0:
                context_bytes = rank.generator.context_bytes
                recorded[arm.name] = (
                    measured, _predicted(job, arm, source, requests, fragments, context_bytes),
                )  # fmt: skip
            for _ in range(job.warm_ups - 1):
                run_once(rank, transport, requests)
        missing: list[Any] = [store.missing(job.repeats)]
        dist.broadcast_object_list(missing, src=0)
        for repeat in missing[0]:
            arms = {}
            turn = repeat % len(ranks)  # no arm is always the first
            for arm, rank in ranks[turn:] + ranks[:turn]:
                arms[arm.name] = run_once(rank, transport, requests)
            store.keep(repeat, arms)
    if context.rank:
        return None
    return put_together(job, recorded, store.repeats(job.repeats), len(missing[0]))


def _predicted(
    job: BenchJob,
    arm: Arm,
    source: Source,
    requests: Requests,
    fragments: list[Fragment],
    context_bytes: ContextBytes,
) -> dict[str, Any]:
    layout = source.layout
    trace = merge(
        fragments,
        num_experts=layout.num_experts,
        layer_ids=[layer.layer_id for layer in layout.layers],
        homes=requests.homes,
        prompt_lengths=[len(prompt) for prompt in requests.prompts],
        model=ModelDims(),
    )
    matrices = sum(int(np.prod(s)) for s in layout.expert_parameters.values() if len(s) >= 2)
    dims = ModelDims(job.folder.name, layout.hidden_size, layout.expert_bytes, 2.0 * matrices)
    return predict(
        trace,
        arm.placement,
        arm.way,
        dims=dims,
        element_bytes=layout.dtype.itemsize,
        context_bytes=context_bytes,
        cluster=job.cluster,
    )

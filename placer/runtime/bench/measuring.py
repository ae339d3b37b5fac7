"""What one arm does with the requests: sent, computed, timed; on all ranks together.

Shapes: L layers, G ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from placer.runtime.counters import LINKS, PARTS
from placer.runtime.rank import RankModel
from placer.runtime.recording import Fragment
from placer.runtime.transport import Transport

PHASES = ("prefill", "decode")  # by their number in a trace
ALL_PARTS = (*PARTS, "context", "rest")


@dataclass(frozen=True, eq=False)
class Requests:
    """The same for all arms.

    Attributes:
        prompts: token ids of each.
        homes: [requests] rank where each enters.
        batch_size, max_new_tokens: as in `BenchJob`.
    """

    prompts: Sequence[Sequence[int]]
    homes: Sequence[int]
    batch_size: int
    max_new_tokens: int


def run_once(rank: RankModel, transport: Transport, requests: Requests) -> dict[str, Any]:
    """All requests, once; every rank gets the figures of the whole group, as JSON.

    `seconds` by phase and part (`context`: the exchanges that end passes) are means over ranks,
    waiting for others included, so that with `rest` they add up to the mean rank's time.
    """
    counters = rank.counters
    transport.barrier("the start of a repeat", counters)
    counters.reset()
    prefill = decode = 0.0
    made: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(requests.prompts), requests.batch_size):
        batch = slice(first, first + requests.batch_size)
        found = rank.generator.generate(
            requests.prompts[batch], requests.max_new_tokens, homes=requests.homes[batch]
        )
        made += found.tokens
        prefill += found.prefill_seconds
        decode += found.decode_seconds
    wall = time.perf_counter() - start
    everybody: list[Any] = [None] * transport.num_ranks
    own = {
        "wall": wall,
        "prefill": prefill,
        "decode": decode,
        "seconds": counters.seconds,
        "context": counters.context_seconds,
        "messages": counters.messages,
        "hidden_bytes": counters.hidden_bytes,
        "routing_bytes": counters.routing_bytes,
        "kv_bytes": counters.kv_bytes,
        "control_bytes": counters.control_bytes,
        "pairs": counters.pairs,
        "collectives": dict(sorted(counters.collectives.items())),
    }
    dist.all_gather_object(everybody, own)
    return _put_together(everybody, made)


def record_once(
    rank: RankModel, transport: Transport, requests: Requests
) -> tuple[dict[str, Any], list[Fragment]]:
    """`run_once`, and on rank 0 the routing of all tokens, requests numbered over all batches."""
    recorder = rank.recorder
    assert recorder is not None
    assert not recorder.fragments
    recorder.is_on = True
    measured = run_once(rank, transport, requests)
    recorder.is_on = False
    own, recorder.fragments = recorder.fragments, []
    everybody: list[Any] = [None] * transport.num_ranks
    dist.all_gather_object(everybody, own)
    fragments = [fragment for part in everybody for fragment in part]
    # every request makes as many passes, so the batch follows from the number of the pass
    first = min(fragment.step for fragment in fragments)
    return measured, [
        replace(
            fragment,
            request=fragment.request
            + (fragment.step - first) // requests.max_new_tokens * requests.batch_size,
        )
        for fragment in fragments
    ]


def _phase_of(parts: np.ndarray, context: float, wall: float) -> dict[str, float]:
    """Seconds of a phase: of [parts], of what ends passes, and the rest of the mean rank's."""
    return {
        **dict(zip(PARTS, map(float, parts), strict=True)),
        "context": context,
        "rest": wall - float(parts.sum()) - context,
    }


def _put_together(everybody: list[dict[str, Any]], made: list[list[int]]) -> dict[str, Any]:
    def total(name: str) -> np.ndarray:
        return np.asarray(np.sum([one[name] for one in everybody], axis=0))

    def by_link(values: np.ndarray) -> dict[str, int]:
        return dict(zip(LINKS, (int(v) for v in values), strict=True))

    seconds = total("seconds") / len(everybody)  # [phase, L, parts]
    phases = {
        name: _phase_of(seconds[i].sum(axis=0), float(total("context")[i]) / len(everybody),
                        float(total(name)) / len(everybody))
        for i, name in enumerate(PHASES)
    }  # fmt: skip
    wall = max(float(one["wall"]) for one in everybody)
    pairs = np.stack([one["pairs"] for one in everybody], axis=1)  # [L, G]
    new_tokens = sum(map(len, made))
    return {
        "wall_seconds": wall,
        "prefill_seconds": max(float(one["prefill"]) for one in everybody),
        "decode_seconds": max(float(one["decode"]) for one in everybody),
        "new_tokens": new_tokens,
        "tokens_per_second": new_tokens / wall,
        "seconds": {part: sum(phase[part] for phase in phases.values()) for part in ALL_PARTS},
        "seconds_by_phase": phases,
        "seconds_by_layer": {
            part: seconds[:, :, i].sum(axis=0).tolist() for i, part in enumerate(PARTS)
        },
        "messages": by_link(total("messages").sum(axis=(0, 1))),
        "dispatch_messages": by_link(total("messages")[:, 0].sum(axis=0)),
        "hidden_bytes": by_link(total("hidden_bytes").sum(axis=(0, 1))),
        "hidden_bytes_by_layer": total("hidden_bytes").sum(axis=1).tolist(),
        "routing_bytes": by_link(total("routing_bytes").sum(axis=(0, 1))),
        "kv_bytes": by_link(total("kv_bytes")),
        "control_bytes": int(total("control_bytes")),
        "collectives": everybody[0]["collectives"],
        "pairs": pairs.tolist(),
        "imbalance": float((pairs.max(axis=1) / pairs.mean(axis=1)).mean()),
        "tokens": made,
    }

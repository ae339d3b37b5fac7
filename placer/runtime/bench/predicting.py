"""What the replay and the cost model say of the tokens that an arm ran.

Traffic and load are counted by the replay from the routing that was recorded; they must be what the
runtime counted, exactly. Times are modelled: from the counts, and a cluster's figures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cluster import Cluster
from placer.cost.batching import recorded_passes
from placer.cost.links import Links
from placer.cost.pricing import Pricing, Transport
from placer.cost.serving import Server, home_ranks
from placer.cost.walking import Setting, count_batches, price_batches
from placer.placement import Placement
from placer.plan import Dispatch
from placer.runtime.bench.job import Way
from placer.runtime.bench.measuring import PHASES
from placer.runtime.context_cache import ContextBytes
from placer.runtime.counters import PARTS, Link
from placer.runtime.rows import routing_bytes
from placer.trace import DECODE, PREFILL, Trace
from placer.trace.model import ModelDims

_MOVING: tuple[Link, ...] = ("same_node", "other_node")  # the replay's links 0 and 1
_NEXT_TOKEN_BYTES = 16  # a request's number and its next token


def predict(
    trace: Trace,
    placement: Placement,
    way: Way,
    *,
    dims: ModelDims,
    element_bytes: int,
    context_bytes: ContextBytes,
    cluster: Cluster | None,
) -> dict[str, Any]:
    """As JSON; the keys are those of what is measured.

    Args:
        trace: the tokens, with forward passes and homes.
        placement: where the experts are.
        way: how tokens travel; under `coherent`, prefill runs as `alltoall`.
        dims: of the model, as its weights are held.
        element_bytes: of an element of a hidden state.
        context_bytes: of a token, that every other rank is sent when a pass ends.
        cluster: None for no times.
    """
    messages = np.zeros((placement.num_layers, 2, len(_MOVING)), np.int64)
    routing = np.zeros(len(_MOVING), np.int64)
    pairs = np.zeros((placement.num_layers, placement.num_ranks), np.int64)
    layers = np.zeros((len(PHASES), placement.num_layers, len(PARTS)))
    context = np.zeros(len(PHASES))
    missing: tuple[str, ...] = ()
    for phase in (PREFILL, DECODE):
        part = trace.select(trace.phase == phase)
        if not part.num_tokens:
            continue
        how: Dispatch = "alltoall" if (way.dispatch, phase) == ("coherent", PREFILL) else (
            way.dispatch
        )  # fmt: skip
        setting = Setting(
            part, home_ranks(part, placement.num_ranks), Server(placement, how, "local"), how,
            way.deduplicate_nodes,
            placement.num_ranks if cluster is None else cluster.ranks_per_leaf, False, np.zeros(0),
        )  # fmt: skip
        sent, computed = _counted(setting)
        messages += sent
        pairs += computed
        of_way = np.array(_beside(trace.top_k, how))
        routing += np.tensordot(of_way, sent.sum(axis=0), 1)
        if cluster is not None:
            transport = _transport(way, int(dims.hidden_size or 1), element_bytes, trace.top_k, how)
            pricing = Pricing(cluster, dims, transport, how, trace.top_k)
            missing = pricing.missing
            layers[phase] = _layer_seconds(setting, pricing)
            context[phase] = _context_seconds(part, context_bytes, cluster)
    states = messages.sum(axis=(0, 1))
    found: dict[str, Any] = {
        "modelled": True,
        "tokens": trace.num_tokens,
        "hidden_bytes": _by_link(states * int(dims.hidden_size or 0) * element_bytes),
        "routing_bytes": _by_link(routing),
        "kv_bytes": _by_link(_gathered(trace.num_tokens * context_bytes.kv, placement)),
        "messages": _by_link(states),
        "pairs": pairs.tolist(),
        "imbalance": float((pairs.max(axis=1) / pairs.mean(axis=1)).mean()),
        "seconds": None,
        "seconds_by_phase": None,
        "seconds_by_layer": None,
        "missing": list(missing),
    }
    if cluster is not None and not missing:
        by_phase = np.concatenate([layers.sum(axis=1), context[:, None]], axis=1)
        names = (*PARTS, "context")
        found["seconds"] = dict(zip(names, by_phase.sum(axis=0).tolist(), strict=True))
        found["seconds_by_phase"] = {
            phase: dict(zip(names, by_phase[i].tolist(), strict=True))
            for i, phase in enumerate(PHASES)
        }
        found["seconds_by_layer"] = dict(zip(PARTS, layers.sum(axis=0).T.tolist(), strict=True))
    return found


def _counted(setting: Setting) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[L, way, link] hidden states that move, and [L, G] pairs, in all passes together."""
    placement = setting.server.placement
    messages = np.zeros((placement.num_layers, 2, len(_MOVING)), np.int64)
    pairs = np.zeros((placement.num_layers, placement.num_ranks), np.int64)
    for counts in count_batches(setting, recorded_passes(setting.trace)):
        pairs += counts.pairs.sum(axis=0, dtype=np.int64)
        for way, states in enumerate((counts.dispatch, counts.combine)):
            sent = states[:, :, :, 0].sum(axis=(0, 3), dtype=np.int64)  # [L, link]
            messages[:, way] += sent[:, : len(_MOVING)]
    if setting.dispatch == "allgather":
        messages += _gathered(setting.trace.num_tokens, placement)
    return messages, pairs


def _gathered(total: int, placement: Placement) -> NDArray[np.int64]:
    """[2] by link: what an all-gather sends of so much; to every node once, there to all ranks."""
    across = total * (placement.num_nodes - 1)
    within = total * (placement.num_ranks - 1) - across
    return np.array([within, across], np.int64)


def _layer_seconds(setting: Setting, pricing: Pricing) -> NDArray[np.float64]:
    """[L, parts] of these passes."""
    setting = setting._replace(with_pairs=pricing.links.has_pairs, increments=pricing.increments)
    found = [
        np.stack([getattr(priced, f"{part}_us").sum(axis=0) for part in PARTS], axis=1)
        for priced in price_batches(setting, recorded_passes(setting.trace), pricing)
    ]
    return np.asarray(np.sum(found, axis=0)) / 1e6


def _context_seconds(trace: Trace, context_bytes: ContextBytes, cluster: Cluster) -> float:
    """Of the all-gathers that end passes: next tokens, and the context of all tokens."""
    assert trace.step is not None
    _, of_token = np.unique(trace.step, return_inverse=True)
    tokens = np.bincount(of_token.reshape(-1))
    requests = np.array([len(np.unique(trace.request[of_token == i])) for i in range(len(tokens))])
    total_bytes = tokens * (context_bytes.kv + context_bytes.rows) + requests * _NEXT_TOKEN_BYTES
    wire, latency, _ = Links(cluster).all_gather(total_bytes.astype(np.float64))
    return float((wire + latency).sum()) / 1e6


def _beside(top_k: int, how: Dispatch) -> tuple[int, int]:
    """Bytes that go with a hidden state on dispatch and on combine."""
    moves = how == "coherent"
    return routing_bytes(top_k, moves), 4 * moves


def _transport(
    way: Way, hidden_size: int, element_bytes: int, top_k: int, how: Dispatch
) -> Transport:
    """Bytes of elements with what goes beside them spread over them.

    Keys and values are priced apart, by `_context_seconds`.
    """
    there, back = (element_bytes + extra / hidden_size for extra in _beside(top_k, how))
    return Transport(way.deduplicate_nodes, there, back, kv_bytes_per_token=0)


def _by_link(values: NDArray[np.int64]) -> dict[str, int]:
    return dict(zip(_MOVING, map(int, values), strict=True))

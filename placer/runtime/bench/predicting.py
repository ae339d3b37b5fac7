"""What the replay and the cost model say of the tokens that an arm ran.

Traffic and load are counted by the replay from the routing that was recorded; they must be what the
runtime counted, exactly. Times are modelled: from the counts, and a cluster's figures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from placer.cluster import Cluster
from placer.cost.batching import recorded_passes
from placer.cost.pricing import Pricing, Transport
from placer.cost.serving import Server, home_ranks
from placer.cost.walking import Setting, count_batches, price_batches
from placer.placement import Placement
from placer.plan import Dispatch
from placer.runtime.counters import Link
from placer.runtime.rows import routing_bytes
from placer.trace import DECODE, PREFILL, Trace
from placer.trace.model import ModelDims

_MOVING: tuple[Link, ...] = ("same_node", "other_node")  # the replay's links 0 and 1


def predict(
    trace: Trace,
    placement: Placement,
    dispatch: Dispatch,
    *,
    deduplicate_nodes: bool,
    dims: ModelDims,
    element_bytes: int,
    kv_bytes_per_token: float | None,
    cluster: Cluster | None,
) -> dict[str, Any]:
    """As JSON; the keys are those of what is measured.

    Args:
        trace: the tokens, with forward passes and homes.
        placement: where the experts are.
        dispatch: of decode; under `coherent`, prefill runs as `alltoall`.
        deduplicate_nodes: one copy of a token per other node.
        dims: of the model, as its weights are held.
        element_bytes: of an element of a hidden state.
        kv_bytes_per_token: keys and values of a token over all layers.
        cluster: None for no times.
    """
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    messages = np.zeros((num_layers, 2, len(_MOVING)), np.int64)
    pairs = np.zeros((num_layers, num_ranks), np.int64)
    seconds: dict[str, Any] = {
        part: np.zeros(num_layers) for part in ("dispatch", "compute", "combine")
    }
    kv_seconds = 0.0
    missing: tuple[str, ...] = ()
    for phase in (PREFILL, DECODE):
        part = trace.select(trace.phase == phase)
        if not part.num_tokens:
            continue
        how: Dispatch = "alltoall" if (dispatch, phase) == ("coherent", PREFILL) else dispatch
        server = Server(placement, how, "local")
        setting = Setting(
            part, home_ranks(part, num_ranks), server, how, deduplicate_nodes,
            num_ranks if cluster is None else cluster.ranks_per_leaf, False, np.zeros(0),
        )  # fmt: skip
        batching = recorded_passes(part)
        for counts in count_batches(setting, batching):
            pairs += counts.pairs.sum(axis=0, dtype=np.int64)
            for way, states in enumerate((counts.dispatch, counts.combine)):
                sent = states[:, :, :, 0].sum(axis=(0, 3), dtype=np.int64)  # [L, link]
                messages[:, way] += sent[:, :2]
        if how == "allgather":
            messages += _gathered(part.num_tokens, placement)
        if cluster is None:
            continue
        transport = _transport(
            deduplicate_nodes, int(dims.hidden_size or 1), element_bytes, trace.top_k,
            how == "coherent", kv_bytes_per_token,
        )  # fmt: skip
        pricing = Pricing(cluster, dims, transport, how, trace.top_k)
        missing = pricing.missing
        priced_setting = setting._replace(
            with_pairs=pricing.links.has_pairs, increments=pricing.increments
        )
        for priced in price_batches(priced_setting, batching, pricing):
            for name, total in seconds.items():
                total += getattr(priced, f"{name}_us").sum(axis=0) / 1e6
            kv_seconds += float(priced.kv_us.sum()) / 1e6
    state_bytes = int(dims.hidden_size or 0) * element_bytes
    moving = messages.sum(axis=(0, 1))
    found: dict[str, Any] = {
        "modelled": True,
        "tokens": trace.num_tokens,
        "hidden_bytes": dict(zip(_MOVING, map(int, moving * state_bytes), strict=True)),
        "messages": dict(zip(_MOVING, map(int, moving), strict=True)),
        "pairs": pairs.tolist(),
        "imbalance": float((pairs.max(axis=1) / pairs.mean(axis=1)).mean()),
        "seconds": None,
        "seconds_by_layer": None,
        "missing": list(missing),
    }
    if cluster is not None and not missing:
        found["seconds"] = {
            **{name: float(total.sum()) for name, total in seconds.items()}, "kv": kv_seconds,
        }  # fmt: skip
        found["seconds_by_layer"] = {name: total.tolist() for name, total in seconds.items()}
    return found


def _gathered(num_tokens: int, placement: Placement) -> np.ndarray:
    """[2] states by link, one way, of a layer: to every node once, from there to its ranks."""
    across = num_tokens * (placement.num_nodes - 1)
    within = num_tokens * (placement.num_ranks - 1) - across
    return np.array([within, across])


def _transport(
    deduplicate_nodes: bool,
    hidden_size: int,
    element_bytes: int,
    top_k: int,
    with_row: bool,
    kv_bytes_per_token: float | None,
) -> Transport:
    """Bytes of elements with the routing that travels beside them spread over them."""
    there = routing_bytes(top_k, with_row) / hidden_size
    back = 4 * with_row / hidden_size
    return Transport(
        deduplicate_nodes, element_bytes + there, element_bytes + back, kv_bytes_per_token
    )

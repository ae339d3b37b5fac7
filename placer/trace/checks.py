"""`make_trace`: the one door through which arrays become a `Trace`, checked and tidied.

Shapes: T tokens, L MoE layers, K experts per token, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from placer.errors import BadFileError
from placer.trace.labels import labels_by_request
from placer.trace.model import ModelDims, Trace

_BLOCK_ROWS = 1 << 14  # token-layers that are checked at once, so that they stay in the cache
_PAIRWISE_TOP_K = 24  # up to here, comparing columns beats sorting rows


def make_trace(
    *,
    experts: ArrayLike,
    num_experts: int,
    layer_ids: ArrayLike | None = None,
    request: ArrayLike | None = None,
    position: ArrayLike | None = None,
    phase: ArrayLike | None = None,
    step: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    home: ArrayLike | None = None,
    labels: Mapping[int, str] | Sequence[str | None] | NDArray[Any] | None = None,
    model: ModelDims | None = None,
    where: str = "trace",
) -> Trace:
    """Check arrays, fill in defaults and build a `Trace`.

    Arrays that are already in the right type, order and layout are not copied.

    Args:
        experts: [T, L, K] integers, or [T, L] for one expert per token; -1 = unused. Rows where
            an unused entry stands before a used one are closed up (their weights move along).
        num_experts: E.
        layer_ids: [L] real layer numbers, increasing; default 0..L-1. A layer that routes its
            tokens several times stands there once for each round.
        request: [T]; default one request, 0.
        position: [T]; default the running index of a token within its request.
        phase: [T], 0 prefill or 1 decode; default prefill.
        step: [T] number of the forward pass, or None.
        weights: shaped as `experts`; gate weights, or None. Those of unused entries become 0.
        home: [T] rank where a token entered, or None.
        labels: request id -> label, or a sequence (see `labels_by_request`).
        model: dimensions of the model.
        where: name of the source, for messages.

    Raises:
        BadFileError: says what is wrong, at which token and layer, and what was expected.
    """
    num_experts = check_num_experts(num_experts, where)
    table = expert_table(experts, where)
    num_tokens, num_layers, _ = table.shape
    if num_tokens == 0:
        raise BadFileError(f"{where} holds no tokens", "was the run that it records cut off?")
    ids = check_layer_ids(
        np.arange(num_layers) if layer_ids is None else layer_ids, num_layers, where
    )
    table, gates = check_routing(table, num_experts, ids, where, weights=weights)
    requests = (
        np.zeros(num_tokens, np.int64)
        if request is None
        else check_per_token("request", request, num_tokens, where)
    )
    positions = (
        running_index(requests)
        if position is None
        else check_per_token("position", position, num_tokens, where)
    )
    phases = (
        np.zeros(num_tokens, np.uint8) if phase is None else check_phase(phase, num_tokens, where)
    )
    return Trace(
        experts=table,
        num_experts=num_experts,
        layer_ids=ids,
        request=requests,
        position=positions,
        phase=phases,
        step=None if step is None else check_per_token("step", step, num_tokens, where),
        weights=gates,
        home=None if home is None else check_per_token("home", home, num_tokens, where),
        labels={} if labels is None else labels_by_request(labels, np.unique(requests), where),
        model=ModelDims() if model is None else model,
    )


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """The type that expert ids are kept in: int16, or int32 above 32767 experts."""
    return np.dtype(np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32)


def check_num_experts(num_experts: int, where: str) -> int:
    """E as an int, when it is one."""
    if isinstance(num_experts, bool) or not isinstance(num_experts, int | np.integer):
        raise BadFileError(f"{where}: num_experts is {num_experts!r}, expected an integer")
    if not 1 <= num_experts <= np.iinfo(np.int32).max:
        raise BadFileError(f"{where}: num_experts is {num_experts}, expected 1 or more")
    return int(num_experts)


def expert_table(experts: ArrayLike, where: str) -> NDArray[np.integer]:
    """`experts` as [T, L, K] integers of any width; [T, L] becomes K = 1."""
    table = np.asarray(experts)
    if table.dtype.kind not in "iu":
        raise BadFileError(f"{where}: experts holds {table.dtype}, expected integers")
    if table.ndim == 2:
        table = table[:, :, None]
    if table.ndim != 3:
        raise BadFileError(
            f"{where}: experts has shape {table.shape}, expected [tokens, layers, k] "
            "or [tokens, layers]"
        )
    for axis, name in ((1, "layers"), (2, "experts per token")):
        if table.shape[axis] == 0:
            raise BadFileError(f"{where}: experts has shape {table.shape}: no {name}")
    return table


def check_layer_ids(layer_ids: ArrayLike, num_layers: int, where: str) -> NDArray[np.int64]:
    """[L] int64 layer numbers, increasing; equal ones are routing rounds of one layer."""
    ids = np.asarray(layer_ids)
    if ids.dtype.kind not in "iu" or ids.shape != (num_layers,):
        raise BadFileError(
            f"{where}: layer_ids is {ids.dtype} of shape {ids.shape}, "
            f"expected {num_layers} integers, one for each layer of experts"
        )
    ids = ids.astype(np.int64, copy=False)
    if ids[0] < 0:
        raise BadFileError(f"{where}: layer_ids starts at {ids[0]}, expected 0 or more")
    unordered = np.flatnonzero(ids[1:] < ids[:-1])
    if unordered.size:
        at = int(unordered[0])
        raise BadFileError(
            f"{where}: layer_ids has {ids[at + 1]} after {ids[at]}, expected increasing numbers",
            "sort the layers of experts by their real layer number; rounds of one layer repeat it",
        )
    return ids


def check_per_token(
    name: str, values: ArrayLike, num_tokens: int, where: str, first_token: int = 0
) -> NDArray[np.int64]:
    """[T] int64, none negative."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.shape != (num_tokens,):
        raise BadFileError(
            f"{where}: {name} is {array.dtype} of shape {array.shape}, "
            f"expected {num_tokens} integers, one for each token"
        )
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise BadFileError(f"{where}: {name} holds {array.max()}, more than an int64 can hold")
    array = array.astype(np.int64, copy=False)
    if array.size and array.min() < 0:
        at = int(np.flatnonzero(array < 0)[0])
        raise BadFileError(
            f"{where}: {name} of token {first_token + at} is {array[at]}, expected 0 or more",
            "leave out padding tokens",
        )
    return array


def check_phase(
    values: ArrayLike, num_tokens: int, where: str, first_token: int = 0
) -> NDArray[np.uint8]:
    """[T] uint8, 0 or 1."""
    array = np.asarray(values)
    if array.dtype.kind not in "iub" or array.shape != (num_tokens,):
        raise BadFileError(
            f"{where}: phase is {array.dtype} of shape {array.shape}, "
            f"expected {num_tokens} integers, one for each token"
        )
    if array.size and (array.min() < 0 or array.max() > 1):
        at = int(np.flatnonzero((array < 0) | (array > 1))[0])
        raise BadFileError(
            f"{where}: phase of token {first_token + at} is {array[at]}, "
            "expected 0 (prefill) or 1 (decode)"
        )
    return array.astype(np.uint8, copy=False)


def check_routing(
    table: NDArray[np.integer],
    num_experts: int,
    layer_ids: NDArray[np.int64],
    where: str,
    *,
    weights: ArrayLike | None = None,
    first_token: int = 0,
) -> tuple[NDArray[np.integer], NDArray[np.float32] | None]:
    """Check expert ids and gate weights, and close up rows so that used ids come first.

    Args:
        table: [T, L, K] integers, as `expert_table` returns them.
        num_experts: E.
        layer_ids: [L].
        where: name of the source, for messages.
        weights: shaped as `table` (or [T, L] for K = 1), or None.
        first_token: number of the first token in the source, for messages.

    Returns:
        [T, L, K] ids in `expert_dtype(E)` and the weights as float32, both C-contiguous.
    """
    _, num_layers, top_k = table.shape
    if top_k > num_experts:
        raise BadFileError(
            f"{where}: a token may use {top_k} experts of a layer that has {num_experts}",
            "is num_experts right?",
        )
    dtype = expert_dtype(num_experts)
    rows = np.ascontiguousarray(table).reshape(-1, top_k)
    any_unused = False
    unordered: list[NDArray[np.intp]] = []
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        low, high = block.min(), block.max()
        if low < -1 or high >= num_experts:
            _refuse_range(block, start + first_token * num_layers, num_experts, layer_ids, where)
        columns: NDArray[np.integer] = np.ascontiguousarray(block.T, dtype=dtype)
        if low < 0:
            any_unused = True
            unused = columns < 0
            gap = (unused[:-1] & ~unused[1:]).any(axis=0)
            if gap.any():
                unordered.append(np.flatnonzero(gap) + start)
            # unused entries get distinct negative ids, so that they never look like repeats
            stand_ins = -1 - np.arange(top_k, dtype=dtype)
            columns = np.where(unused, stand_ins[:, None], columns)
        if _has_repeat(columns):
            _refuse_repeat(block, start + first_token * num_layers, layer_ids, where)
    gates = None if weights is None else _gate_weights(weights, table.shape, where)
    checked: NDArray[np.integer] = rows.astype(dtype, copy=False)
    if unordered:
        at = np.concatenate(unordered)
        order = np.argsort(checked[at] < 0, axis=1, kind="stable")
        checked = checked.copy() if checked is rows else checked
        checked[at] = np.take_along_axis(checked[at], order, axis=1)
        if gates is not None:
            flat = gates.reshape(-1, top_k).copy()
            flat[at] = np.take_along_axis(flat[at], order, axis=1)
            gates = flat.reshape(table.shape)
    checked = checked.reshape(table.shape)
    if gates is not None:
        if any_unused:
            gates = np.where(checked >= 0, gates, np.float32(0))
        finite = np.isfinite(gates)
        if not finite.all():
            token, layer, column = (int(i) for i in np.argwhere(~finite)[0])
            raise BadFileError(
                f"{where}: weight of expert {checked[token, layer, column]} at token "
                f"{first_token + token}, layer {layer_ids[layer]} is {gates[token, layer, column]},"
                " expected a finite float32",
                "did the model overflow? leave the weights out to use the experts alone",
            )
    return checked, gates


def running_index(request: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T] how many earlier tokens belong to the same request."""
    order = np.argsort(request, kind="stable")
    ordered = request[order]
    is_first = np.ones(len(request), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    running = np.arange(len(request))
    start = np.maximum.accumulate(np.where(is_first, running, 0))
    index = np.empty(len(request), np.int64)
    index[order] = running - start
    return index


def _gate_weights(weights: ArrayLike, shape: tuple[int, ...], where: str) -> NDArray[np.float32]:
    gates = np.asarray(weights)
    if gates.dtype.kind not in "fiu":
        raise BadFileError(f"{where}: weights holds {gates.dtype}, expected floats")
    if gates.ndim == 2 and shape[2] == 1:
        gates = gates[:, :, None]
    if gates.shape != shape:
        raise BadFileError(
            f"{where}: weights has shape {gates.shape}, expected {shape} as experts has"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as infinite
        return np.ascontiguousarray(gates, dtype=np.float32)


def _has_repeat(columns: NDArray[np.integer]) -> bool:
    """Whether any column of `columns` [K, rows] holds a value twice."""
    if len(columns) > _PAIRWISE_TOP_K:
        ordered = np.sort(columns, axis=0)
        return bool((ordered[1:] == ordered[:-1]).any())
    return any((columns[i + 1 :] == columns[i]).any() for i in range(len(columns) - 1))


def _refuse_range(
    block: NDArray[np.integer],
    first_row: int,
    num_experts: int,
    layer_ids: NDArray[np.int64],
    where: str,
) -> NoReturn:
    row, column = np.argwhere((block < -1) | (block >= num_experts))[0]
    token, layer = divmod(first_row + int(row), len(layer_ids))
    raise BadFileError(
        f"{where}: expert id {block[row, column]} at token {token}, layer {layer_ids[layer]}, "
        f"expected -1..{num_experts - 1}",
        "is num_experts right, and are these logical ids (not slots)?",
    )


def _refuse_repeat(
    block: NDArray[np.integer], first_row: int, layer_ids: NDArray[np.int64], where: str
) -> NoReturn:
    ordered = np.sort(block, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    row, column = np.argwhere(twice)[0]
    token, layer = divmod(first_row + int(row), len(layer_ids))
    raise BadFileError(
        f"{where}: expert {ordered[row, column + 1]} stands twice at token {token}, "
        f"layer {layer_ids[layer]}; a token uses an expert at most once",
        "fill unused entries with -1",
    )

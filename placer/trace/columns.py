"""The columns of a part, and how arrays become columns and columns arrays.

| column | type | |
| --- | --- | --- |
| request, position | int64 | |
| phase | uint8 | 0 prefill, 1 decode |
| step, home | int64 | where the manifest says so |
| label | dictionary<string> | null where a request has none |
| experts_<layer id> | list<int16> or list<int32> | only those used, so lengths may differ |
| weights_<layer id> | list<float32> | where the manifest says so; as long as the list of experts |

Where a layer routes its tokens several times, its second round is experts_<layer id>_2, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from placer.errors import BadFileError
from placer.trace.checks import expert_dtype
from placer.trace.layout import Manifest
from placer.trace.rounds import round_names
from placer.wording import counted

ROW_GROUP_TOKENS = 32768


def experts_columns(manifest: Manifest) -> list[str]:
    """[L] names of the columns of expert ids."""
    return [f"experts_{name}" for name in round_names(manifest.layer_ids)]


def weights_columns(manifest: Manifest) -> list[str]:
    """[L] names of the columns of gate weights."""
    return [f"weights_{name}" for name in round_names(manifest.layer_ids)]


def token_columns(manifest: Manifest) -> list[str]:
    """The integer columns with one value per token."""
    optional = [name for name in ("step", "home") if getattr(manifest, name)]
    return ["request", "position", "phase", *optional]


def schema(manifest: Manifest) -> pa.Schema:
    """The schema of every part of a trace."""
    fields = [
        pa.field(name, pa.uint8() if name == "phase" else pa.int64(), nullable=False)
        for name in token_columns(manifest)
    ]
    fields.append(pa.field("label", pa.dictionary(pa.int32(), pa.string())))
    expert_type = pa.from_numpy_dtype(expert_dtype(manifest.num_experts))
    names = zip(experts_columns(manifest), weights_columns(manifest), strict=True)
    for experts, weights in names:
        fields.append(_list_field(experts, expert_type))
        if manifest.weights:
            fields.append(_list_field(weights, pa.float32()))
    return pa.schema(fields)


def same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether two types hold the same values; whether nulls are allowed does not matter."""
    if pa.types.is_list(expected) and pa.types.is_list(found):
        return bool(found.value_type == expected.value_type)
    return bool(found == expected)


def writer_options(manifest: Manifest) -> dict[str, Any]:
    """Encodings that every reader of Parquet knows: ids by dictionary, counters by differences."""
    counters = [name for name in token_columns(manifest) if name != "phase"]
    encoding = dict.fromkeys(counters, "DELTA_BINARY_PACKED")
    experts = [f"{name}.list.element" for name in experts_columns(manifest)]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": ["phase", "label", *experts],
        "column_encoding": encoding,
        "write_statistics": ["request", "position", "phase", "step"],
        "write_page_checksum": True,
    }


def to_table(
    manifest: Manifest,
    arrays: dict[str, NDArray[Any] | None],
    labels: Sequence[str | None] | None,
) -> pa.Table:
    """Arrays of t tokens as a table.

    Args:
        manifest: of the trace.
        arrays: `experts` [t, L, K], used entries first; `weights` alike; the columns per token.
        labels: [t], or None for no labels at all.
    """
    experts = arrays["experts"]
    assert experts is not None
    num_tokens = len(experts)
    columns: list[Any] = [pa.array(arrays[name]) for name in token_columns(manifest)]
    label_type = pa.dictionary(pa.int32(), pa.string())
    if labels is None:
        columns.append(pa.nulls(num_tokens, label_type))
    else:
        columns.append(pa.array(labels, pa.string()).dictionary_encode().cast(label_type))
    weights = arrays["weights"] if manifest.weights else None
    all_used = bool((experts >= 0).all())
    for layer in range(len(manifest.layer_ids)):
        ids = np.ascontiguousarray(experts[:, layer])
        used = None if all_used else ids >= 0
        columns.append(_to_list(ids, used))
        if weights is not None:
            columns.append(_to_list(np.ascontiguousarray(weights[:, layer]), used))
    return pa.Table.from_arrays(columns, schema=schema(manifest))


def read_numbers(column: pa.Array, where: str) -> NDArray[Any]:
    """[t] the values of a column of numbers, none of them null; a view where possible."""
    if column.null_count:
        raise BadFileError(f"{where} holds {counted(column.null_count, 'null')}, expected none")
    return np.asarray(column.to_numpy())


def read_list(
    column: pa.Array, out: NDArray[Any], fill: float, where: str
) -> NDArray[np.int64] | None:
    """Put a list column of t tokens into `out` [t, K].

    Returns:
        [t] lengths, or None when every list has K entries.
    """
    offsets = column.offsets.to_numpy()
    start = int(offsets[0])
    inner = column.values.slice(start, int(offsets[-1]) - start)
    if column.null_count:
        raise BadFileError(f"{where} holds {counted(column.null_count, 'null')}, expected lists")
    values = read_numbers(inner, where)
    top_k = out.shape[1]
    lengths: NDArray[np.integer] = np.diff(offsets)
    if values.size == out.size and (lengths == top_k).all():
        out[...] = values.reshape(out.shape)
        return None
    if lengths.size and int(lengths.max()) > top_k:
        row = int(np.flatnonzero(lengths > top_k)[0])
        raise BadFileError(
            f"{where}: row {row} has a list of {lengths[row]}, more than the manifest's top_k "
            f"{top_k}"
        )
    out[...] = fill
    out[np.arange(top_k) < lengths[:, None]] = values
    return np.asarray(lengths, np.int64)


def _to_list(values: NDArray[Any], used: NDArray[np.bool_] | None) -> pa.Array:
    """[t, K] values as lists of their used entries."""
    num_tokens, top_k = values.shape
    if used is None:
        offsets = np.arange(num_tokens + 1, dtype=np.int32) * np.int32(top_k)
        flat = values.reshape(-1)
    else:
        offsets = np.zeros(num_tokens + 1, np.int32)
        np.cumsum(used.sum(axis=1), out=offsets[1:])
        flat = values[used]
    item = pa.field("element", pa.from_numpy_dtype(flat.dtype), nullable=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=pa.list_(item))


def _list_field(name: str, item: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", item, nullable=False)), nullable=False)

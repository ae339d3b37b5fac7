"""A table with a header: .csv, .tsv or .parquet, a row per routed (token, layer, expert) or count.

| column | |
| --- | --- |
| layer, expert | required; real layer numbers, logical expert ids |
| token, or request and position | with them the table is a trace, rows of one token together |
| step, phase (0/1, or prefill/decode), weight, label | of a trace, optional |
| window, count | of load, optional; a row counts once unless `count` says otherwise |

A table without tokens is load: `layer,expert` alone is what llama.cpp's moe-trace example
(pull request 28544) writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import existing_file, number_of_experts
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError
from placer.trace.checks import make_trace
from placer.trace.load import make_load
from placer.trace.model import PHASE_NAMES

_TOKEN_COLUMNS = ("token", "request", "position")
_KNOWN = ("layer", "expert", *_TOKEN_COLUMNS, "step", "phase", "weight", "label", "window", "count")


def read(path: Path, hints: Hints) -> Recorded:
    """Read a table: a trace where it names tokens, else load."""
    columns = _columns(existing_file(path))
    for name in ("layer", "expert"):
        if name not in columns:
            raise BadFileError(
                f"{path} has no column {name}; it has {', '.join(columns) or 'none'}",
                "a matrix of numbers without a header: --from matrix",
            )
    layer, expert = (_whole(columns, name, path) for name in ("layer", "expert"))
    if not len(layer):
        raise BadFileError(f"{path} holds no rows")
    if layer.min() < 0 or expert.min() < 0:
        raise BadFileError(f"{path} holds negative layers or experts")
    warnings = []
    unknown = [name for name in columns if name not in _KNOWN]
    if unknown:
        warnings.append(f"columns that placer does not know: {', '.join(unknown)}")
    found = int(expert.max()) + 1
    num_experts = hints.num_experts
    if num_experts is None:
        num_experts = number_of_experts(hints, found, str(path))
        warnings.append(f"{found} experts: the highest id + 1 (--num-experts says otherwise)")
    elif found > num_experts:
        raise BadFileError(f"{path} holds expert {found - 1}, expected ids below {num_experts}")
    ids, row_layer = np.unique(layer, return_inverse=True)
    if any(name in columns for name in _TOKEN_COLUMNS):
        return _trace(path, columns, ids, row_layer, expert, num_experts, warnings)
    windows, row_window = np.unique(
        _whole(columns, "window", path) if "window" in columns else np.zeros(len(layer), np.int64),
        return_inverse=True,
    )
    count = _whole(columns, "count", path) if "count" in columns else np.ones(len(layer), np.int64)
    load = np.zeros((len(windows), len(ids), num_experts), np.int64)
    np.add.at(load, (row_window, row_layer, expert), count)
    record = make_load(load, layer_ids=ids, source={"importer": "table"}, where=str(path))
    return Recorded(record, warnings)


def _trace(
    path: Path,
    columns: dict[str, NDArray[Any]],
    ids: NDArray[np.int64],
    row_layer: NDArray[np.int64],
    expert: NDArray[np.int64],
    num_experts: int,
    warnings: list[str],
) -> Recorded:
    """Rows of one token and layer become its experts, in the order of the file."""
    if "token" in columns:
        key = _whole(columns, "token", path)
    elif "request" in columns and "position" in columns:
        pairs = np.stack([_whole(columns, name, path) for name in ("request", "position")], axis=1)
        key = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    else:
        raise BadFileError(f"{path} needs a column token, or both request and position")
    _, first, token = np.unique(key, return_index=True, return_inverse=True)
    order_of_tokens = np.argsort(np.argsort(first))  # tokens in the order of their first rows
    token = order_of_tokens[token]
    first = np.sort(first)
    cell = token * len(ids) + row_layer
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
    place = np.empty(len(cell), np.int64)
    place[order] = np.arange(len(cell)) - np.repeat(starts, np.diff(np.append(starts, len(cell))))
    shape = (len(first), len(ids), int(place.max()) + 1)
    experts = np.full(shape, -1, np.int64)
    experts[token, row_layer, place] = expert
    weights = None
    if "weight" in columns:
        weights = np.zeros(shape, np.float32)
        weights[token, row_layer, place] = _numbers(columns, "weight", path)
    else:
        warnings.append("no weights: the first expert of a token counts as its primary")
    of_token: dict[str, Any] = {
        name: _whole(columns, name, path)[first]
        for name in ("request", "position", "step")
        if name in columns
    }
    labels = None
    if "label" in columns and "request" in columns:
        named = zip(of_token["request"].tolist(), columns["label"][first].tolist(), strict=True)
        labels = {request: str(label) for request, label in named if label}
    if "request" not in columns:
        warnings.append("no requests: all tokens count as one request")
    trace = make_trace(
        experts=experts,
        num_experts=num_experts,
        layer_ids=ids,
        weights=weights,
        phase=_phase(columns, path)[first] if "phase" in columns else None,
        labels=labels,
        where=str(path),
        **of_token,
    )
    return Recorded(trace, warnings)


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = pa.parquet.read_table(path)
        elif suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            table = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(delimiter=delimiter))
        else:
            raise BadFileError(f"{path}: a table is a .csv, .tsv or .parquet file")
        return {
            name.strip(): table.column(name).to_numpy(zero_copy_only=False)
            for name in table.column_names
        }
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(
            f"{path} is not a readable table: {str(error).splitlines()[0]}", "was it truncated?"
        ) from None


def _numbers(columns: dict[str, NDArray[Any]], name: str, path: Path) -> NDArray[Any]:
    values = columns[name]
    if values.dtype.kind not in "iuf" or (
        values.dtype.kind == "f" and not np.isfinite(values).all()
    ):
        raise BadFileError(f"{path}: column {name} holds {values.dtype}, or gaps; expected numbers")
    return values


def _whole(columns: dict[str, NDArray[Any]], name: str, path: Path) -> NDArray[np.int64]:
    values = _numbers(columns, name, path)
    if (values != np.floor(values)).any():
        raise BadFileError(f"{path}: column {name} holds fractions, expected whole numbers")
    return values.astype(np.int64)


def _phase(columns: dict[str, NDArray[Any]], path: Path) -> NDArray[np.int64]:
    values = columns["phase"]
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    known = {name: number for number, name in enumerate(PHASE_NAMES)}
    strange = sorted({str(value) for value in values.tolist()} - known.keys())
    if strange:
        raise BadFileError(f"{path}: phase {strange[0]!r}, expected prefill or decode")
    return np.array([known[value] for value in values.tolist()], np.int64)

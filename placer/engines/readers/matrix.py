"""Load as an array of numbers: vllm-ascend's tensor, or whatever a user counted.

[layers, experts], or [windows, layers, experts]; as .pt (a tensor, as
`vllm-ascend/examples/eplb/eplb_strategy.py` reads it), .npy, .npz (one array), .safetensors (one
array) or .csv / .tsv / .txt (a line per layer, no header).
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import (
    as_counts,
    existing_file,
    load_safetensors,
    load_torch,
    moe_layers,
    number_of_experts,
)
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError
from placer.trace.load import make_load


def read(path: Path, hints: Hints) -> Recorded:
    """Read a matrix of load; empty rows are taken for dense layers."""
    load = as_counts(_array(existing_file(path)), str(path), (2, 3))
    if load.ndim == 2:
        load = load[None]
    number_of_experts(hints, load.shape[2], str(path))
    rows, ids, warnings = moe_layers(load.any(axis=(0, 2)), hints, str(path))
    if hints.layer_ids is None:
        warnings.append(
            f"layers are numbered by row, {ids[0]}..{ids[-1]}: say --layer-ids where the model's "
            "first layers are dense"
        )
    record = make_load(load[:, rows], layer_ids=ids, source={"importer": "matrix"}, where=str(path))
    return Recorded(record, warnings)


def _array(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".bin"):
        return _only(load_torch(path), path)
    if suffix == ".safetensors":
        return _only(load_safetensors(path), path)
    if suffix in (".npy", ".npz"):
        try:
            loaded = np.load(path, allow_pickle=False)
            return _only(dict(loaded) if suffix == ".npz" else loaded, path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BadFileError(f"{path} is damaged: {error}", "was it truncated?") from None
    if suffix in (".csv", ".tsv", ".txt"):
        return _text(path)
    raise BadFileError(
        f"{path}: a matrix of load is a .npy, .npz, .pt, .safetensors, .csv, .tsv or .txt file"
    )


def _only(value: Any, path: Path) -> Any:
    """The only array of a dictionary; anything else as it is."""
    if not isinstance(value, dict):
        if not hasattr(value, "shape"):
            raise BadFileError(f"{path} holds a {type(value).__name__}, expected a tensor")
        return value
    if len(value) != 1:
        raise BadFileError(
            f"{path} holds {len(value)} arrays ({', '.join(map(str, list(value)[:5]))}), "
            "expected one"
        )
    return next(iter(value.values()))


def _text(path: Path) -> NDArray[np.float64]:
    try:
        lines = path.read_text(encoding="utf-8").replace(",", " ").splitlines()
        rows = [[float(value) for value in line.split()] for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise BadFileError(
            f"{path} is not a table of numbers: {error}",
            "with a header, it may be a table: --from table",
        ) from None
    if not rows or len({len(row) for row in rows}) > 1:
        raise BadFileError(f"{path}: its lines differ in length", "was it truncated?")
    return np.array(rows)

"""The interchange trace: one .npz file (DESIGN: "Interchange trace"; docs/traces.md).

Nothing is unpickled: an array of objects is refused.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import BadFileError
from placer.files import atomic_path, nothing_at
from placer.trace.checks import make_trace
from placer.trace.model import ModelDims, Trace

KEYS = (
    "experts",
    "num_experts",
    "weights",
    "request",
    "position",
    "phase",
    "step",
    "home",
    "layer_ids",
    "request_label",
    "hidden_size",
    "expert_bytes",
    "expert_flops_per_token",
    "model_name",
)
_HINT = "docs/traces.md describes the file"


def read_npz(path: Path) -> Trace:
    """Read and check an interchange trace.

    Raises:
        BadFileError: missing, truncated, not an .npz file, or not a sound trace.
    """
    return load_npz(path)[0]


def load_npz(path: Path) -> tuple[Trace, list[str]]:
    """`read_npz`, and the names of the keys that placer does not know and leaves aside."""
    arrays, unknown = _read_arrays(path)
    where = str(path)
    for key in ("experts", "num_experts"):
        if key not in arrays:
            raise BadFileError(f"{where} has no {key}, expected an interchange trace", _HINT)
    experts = arrays["experts"]
    num_layers = experts.shape[1] if experts.ndim > 1 else None
    trace = make_trace(
        experts=experts,
        num_experts=_num_experts(arrays["num_experts"], num_layers, arrays.get("layer_ids"), where),
        layer_ids=arrays.get("layer_ids"),
        request=arrays.get("request"),
        position=arrays.get("position"),
        phase=arrays.get("phase"),
        step=arrays.get("step"),
        weights=arrays.get("weights"),
        home=arrays.get("home"),
        labels=arrays.get("request_label"),
        model=_model_dims(arrays, where),
        where=where,
    )
    return trace, unknown


def write_npz(trace: Trace, path: Path, *, force: bool = False) -> None:
    """Write an interchange trace, compressed; what the trace does not have is left out."""
    arrays: dict[str, Any] = {
        "experts": trace.experts,
        "num_experts": np.int64(trace.num_experts),
        "layer_ids": trace.layer_ids,
        "request": trace.request,
        "position": trace.position,
        "phase": trace.phase,
    }
    for key in ("step", "weights", "home"):
        values = getattr(trace, key)
        if values is not None:
            arrays[key] = values
    labels = [trace.labels.get(request, "") for request in trace.requests().tolist()]
    if any(labels):
        # a rank-indexed list may not be mistaken for an id-indexed one: its length never is
        # the largest id + 1 unless the ids are 0..R-1, where both mean the same
        arrays["request_label"] = np.array(labels, dtype=np.str_)
    for key in ("hidden_size", "expert_bytes", "expert_flops_per_token"):
        value = getattr(trace.model, key)
        if value is not None:
            arrays[key] = np.asarray(value)
    if trace.model.name is not None:
        arrays["model_name"] = np.array(trace.model.name)
    with atomic_path(path, force=force) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays that placer knows, and the names of the others."""
    if path.is_dir():
        raise BadFileError(f"{path} is a folder, expected an .npz file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise nothing_at(path) from None
    except OSError as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None
    if magic not in (b"PK\x03\x04", b"PK\x05\x06"):
        raise BadFileError(f"{path} is not an .npz file (it does not start as a zip file)", _HINT)
    key = "its table of contents"
    try:
        with np.load(path, allow_pickle=False) as archive:
            unknown = sorted(name for name in archive.files if name not in KEYS)
            arrays = {}
            for key in archive.files:
                if key in KEYS:
                    arrays[key] = archive[key]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise BadFileError(
            f"{path} is damaged at {key}: {error}", "was the file truncated? make it anew"
        ) from None
    except MemoryError:
        raise BadFileError(
            f"{path}: {key} does not fit in memory",
            "write the trace in parts with placer.trace.TraceWriter, which streams",
        ) from None
    except (ValueError, KeyError, RuntimeError) as error:
        raise BadFileError(
            f"{path}: {key} cannot be read: {error}",
            "plain numeric and string arrays only, no Python objects",
        ) from None
    not_arrays = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
    if not_arrays:
        raise BadFileError(f"{path}: {not_arrays[0]} is not a numpy array", _HINT)
    return arrays, unknown


def _num_experts(
    value: NDArray[Any], num_layers: int | None, layer_ids: NDArray[Any] | None, where: str
) -> int:
    """E from a scalar, or from one number per layer when these agree."""
    if value.dtype.kind not in "iu" or value.ndim > 1 or value.size not in (1, num_layers):
        raise BadFileError(
            f"{where}: num_experts is {value.dtype} of shape {value.shape}, expected one integer"
        )
    counts = value.reshape(-1)
    if (counts != counts[0]).any():
        at = int(np.flatnonzero(counts != counts[0])[0])
        named = layer_ids if layer_ids is not None and layer_ids.shape == counts.shape else None
        first, other = (0, at) if named is None else (named[0], named[at])
        raise BadFileError(
            f"{where}: layer {first} has {counts[0]} experts and layer {other} has {counts[at]}; "
            "all layers of a trace have the same number of experts",
            "make one trace for each group of layers that agree",
        )
    return int(counts[0])


def _model_dims(arrays: dict[str, NDArray[Any]], where: str) -> ModelDims:
    return ModelDims(
        name=_model_name(arrays, where),
        hidden_size=_whole(arrays, "hidden_size", where),
        expert_bytes=_whole(arrays, "expert_bytes", where),
        expert_flops_per_token=_number(arrays, "expert_flops_per_token", where),
    )


def _model_name(arrays: dict[str, NDArray[Any]], where: str) -> str | None:
    if "model_name" not in arrays:
        return None
    value = arrays["model_name"]
    if value.dtype.kind != "U" or value.size != 1:
        raise BadFileError(f"{where}: model_name is {value.dtype}, expected one string")
    return str(value.reshape(-1)[0])


def _whole(arrays: dict[str, NDArray[Any]], key: str, where: str) -> int | None:
    number = _number(arrays, key, where)
    if number is None:
        return None
    if number != int(number):
        raise BadFileError(f"{where}: {key} is {number}, expected a whole number")
    return int(arrays[key].reshape(-1)[0])


def _number(arrays: dict[str, NDArray[Any]], key: str, where: str) -> float | None:
    if key not in arrays:
        return None
    value = arrays[key]
    if value.dtype.kind not in "iuf" or value.size != 1:
        raise BadFileError(
            f"{where}: {key} is {value.dtype} of shape {value.shape}, expected one number"
        )
    number = float(value.reshape(-1)[0])
    if not 0 < number < float("inf"):
        raise BadFileError(f"{where}: {key} is {number}, expected a positive number")
    return number

"""What several readers share: opening files without unpickling, layers that are dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.records import Hints
from placer.errors import BadFileError, MissingExtraError, UsageError
from placer.files import nothing_at


def existing_file(path: Path) -> Path:
    """`path`, when it is a file."""
    if path.is_dir():
        raise BadFileError(f"{path} is a folder, expected a file")
    if not path.exists():
        raise nothing_at(path)
    return path


def files_of(path: Path, pattern: str) -> list[Path]:
    """`path` itself when it is a file, or the files of a folder that match, by name."""
    if not path.is_dir():
        return [existing_file(path)]
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if not found:
        raise BadFileError(f"{path} holds no {pattern}")
    return found


def load_torch(path: Path) -> Any:
    """What torch saved, tensors and plain values only: nothing is ever unpickled."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "trace") from None
    import pickle

    try:
        return torch.load(existing_file(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadFileError(
            f"{path} holds more than tensors and plain values, and placer unpickles nothing",
            "is it the file that the engine wrote?",
        ) from None
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()
        raise BadFileError(
            f"{path} is not a readable PyTorch file: {first[0] if first else error!r}",
            "was it truncated?",
        ) from None


def load_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .safetensors file."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise MissingExtraError("safetensors", "trace") from None
    try:
        arrays: dict[str, NDArray[Any]] = load_file(existing_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadFileError(
            f"{path} is not a readable safetensors file: {error}", "was it truncated?"
        ) from None
    return arrays


def as_counts(value: Any, where: str, ndim: tuple[int, ...]) -> NDArray[Any]:
    """A tensor or array as a numpy array of numbers with one of these numbers of axes."""
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype.kind not in "iuf" or array.ndim not in ndim:
        raise BadFileError(
            f"{where} is {array.dtype} of shape {array.shape}, expected numbers with "
            f"{' or '.join(map(str, ndim))} axes"
        )
    return array


def number_of_experts(hints: Hints, found: int | None, where: str) -> int:
    """E: what the file says, else what the user says; they must agree.

    Raises:
        UsageError: neither says, or they differ.
    """
    if found is None:
        if hints.num_experts is None:
            raise UsageError(
                f"{where} does not say how many experts a layer has", "--num-experts N"
            )
        return hints.num_experts
    if hints.num_experts not in (None, found):
        raise UsageError(f"--num-experts {hints.num_experts}, but {where} is about {found} experts")
    return found


def moe_layers(
    used: Any, hints: Hints, where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Which rows of a table over layers are MoE layers, and their real numbers.

    Engines number rows by hidden layer and leave those of dense layers empty; some have a row per
    MoE layer only.

    Args:
        used: [rows] whether anything was routed there.
        hints: `layer_ids` of the user: as many as there are rows, or a choice of rows.
        where: name of the file.

    Returns:
        [L] rows, [L] layer ids, warnings.
    """
    used = np.asarray(used, bool)
    rows = np.flatnonzero(used)
    if not rows.size:
        raise BadFileError(f"{where} holds no routing at all", "was anything served meanwhile?")
    if hints.layer_ids is None:
        empty = np.flatnonzero(~used)
        note = f"rows {ranges(empty.tolist())} are empty, taken for dense layers"
        return rows, rows, [note] if empty.size else []
    ids = np.array(hints.layer_ids, np.int64)
    if len(ids) == len(used):
        return np.arange(len(used)), ids, []
    if len(ids) < len(used) and ids.max() < len(used):
        return ids, ids, []
    raise UsageError(
        f"--layer-ids names {len(ids)} layers, {where} has {len(used)} rows ({rows.size} used)"
    )


def ranges(numbers: Sequence[int]) -> str:
    """0-2, 5"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

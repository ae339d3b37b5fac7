"""Reading a safetensors checkpoint tensor by tensor, or a slice of one, and nothing else of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from placer.errors import BadFileError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's folder.

    A file is mapped only while one tensor is read, so that what was read does not count as memory
    of the process any longer.

    Attributes:
        folder: where the checkpoint is.
        file_of: name of a tensor -> the file that holds it.
    """

    folder: Path
    file_of: Mapping[str, Path]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        with _opened(self.file_of[name]) as file:
            return tuple(_slice_of(file, name, self.file_of[name]).get_shape())

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor; or, with `row`, its slice [row : row + 1] along the first axis."""
        path = self.file_of[name]
        with _opened(path) as file:
            found = _slice_of(file, name, path)
            tensor: Tensor = found[:] if row is None else found[row : row + 1]
            return tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find out which file holds which tensor.

    Raises:
        BadFileError: there is no safetensors checkpoint, or a shard is missing or damaged.
    """
    if not folder.is_dir():
        raise BadFileError(f"{folder} is not a folder", "give the folder of a checkpoint")
    index = folder / _INDEX
    if index.is_file():
        names = _read_index(index)
        files = {name: folder / shard for name, shard in names.items()}
        for path in sorted(set(files.values())):
            held = _tensor_names(path)
            wanted = next((n for n, f in files.items() if f == path and n not in held), None)
            if wanted is not None:
                raise BadFileError(f"{path} does not hold {wanted}, which {_INDEX} says it does")
        return Checkpoint(folder, files)
    single = folder / _SINGLE
    if single.is_file():
        return Checkpoint(folder, dict.fromkeys(_tensor_names(single), single))
    raise BadFileError(
        f"{folder} holds no safetensors checkpoint ({_SINGLE} or {_INDEX})",
        "other formats are not read: save the model with save_pretrained",
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{path} is not an index of shards: {error!r}") from None
    if not isinstance(names, dict) or not names:
        raise BadFileError(f"{path} names no tensors")
    return {str(name): str(shard) for name, shard in names.items()}


def _tensor_names(path: Path) -> set[str]:
    with _opened(path) as file:
        return set(file.keys())


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise BadFileError(
            f"{path} does not exist", "a shard of the checkpoint is missing: fetch it again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise BadFileError(
            f"{path} cannot be read: {error}", "was the file cut off? fetch it again"
        ) from None


def _slice_of(file: Any, name: str, path: Path) -> Any:
    from safetensors import SafetensorError

    try:
        return file.get_slice(name)
    except SafetensorError as error:
        raise BadFileError(f"{path}: {name} cannot be read: {error}") from None

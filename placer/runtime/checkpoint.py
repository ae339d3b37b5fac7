"""Reading a safetensors checkpoint tensor by tensor, or some rows of one, and nothing else of it.

The format (safetensors' documentation, "Format"): 8 bytes with the length of a JSON header, the
header, which says of every tensor its type, shape and place, and then the tensors' bytes. Headers
are read once. Bytes go from the file straight into a tensor: nothing is mapped, so that no page of
the file counts as memory of the process, and nothing is held twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from placer.errors import BadFileError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MOST_HEADER_BYTES = 10**8  # as the format has it
_MOST_BYTES = 2**16  # of rows that are read at a time where they are converted
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
        path: the file that holds it.
        begin: its first byte in the file.
        dtype, shape: what it is.
    """

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Of an entry along the first axis; of all where there is no axis."""
        return _numel(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's folder.

    Attributes:
        folder: where the checkpoint is.
        tensors: by name.
    """

    folder: Path
    tensors: Mapping[str, Stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor; or the rows `first:last` of it, entries along the first axis."""
        stored = self.tensors[name]
        shape = stored.shape
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
        held = torch.empty(shape, dtype=stored.dtype)
        _fill(held, stored, 0 if rows is None else rows.start * stored.row_bytes)
        return held

    def read_into(self, name: str, held: Tensor) -> None:
        """Fill a contiguous tensor of the same shape, whatever its type and device."""
        stored = self.tensors[name]
        if held.dtype == stored.dtype and held.device.type == "cpu":
            _fill(held, stored, 0)
        elif not stored.shape:
            held.copy_(self.read(name))
        else:
            step = max(1, _MOST_BYTES // max(1, stored.row_bytes))
            for first in range(0, len(held), step):
                rows = slice(first, min(first + step, len(held)))
                held[rows] = self.read(name, rows)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find out where every tensor is.

    Raises:
        BadFileError: there is no safetensors checkpoint, or a shard is missing or damaged.
    """
    if not folder.is_dir():
        raise BadFileError(f"{folder} is not a folder", "give the folder of a checkpoint")
    index = folder / _INDEX
    if index.is_file():
        shard_of = _read_index(index)
        held = {shard: _read_header(folder / shard) for shard in sorted(set(shard_of.values()))}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise BadFileError(
                    f"{folder / shard} does not hold {name}, which {_INDEX} says it does"
                )
        return Checkpoint(folder, {name: held[shard][name] for name, shard in shard_of.items()})
    single = folder / _SINGLE
    if single.is_file():
        return Checkpoint(folder, _read_header(single))
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


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            num_bytes = path.stat().st_size
            if not 2 <= size <= min(_MOST_HEADER_BYTES, num_bytes - 8):
                raise _damaged(path, f"its header is said to have {size:,} bytes")
            entries = json.loads(file.read(size))
        entries.pop("__metadata__", None)
        return {name: _stored(path, 8 + size, num_bytes, name, e) for name, e in entries.items()}
    except FileNotFoundError:
        raise BadFileError(
            f"{path} does not exist", "a shard of the checkpoint is missing: fetch it again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header is none of safetensors ({error!r})") from None


def _stored(path: Path, data: int, num_bytes: int, name: str, entry: Any) -> Stored:
    """A tensor by its entry in the header, whose offsets count from byte `data` of the file."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in _TYPES:
        raise BadFileError(
            f"{path}: {name} is of type {entry['dtype']}, which is not read",
            f"known: {', '.join(_TYPES)}",
        )
    stored = Stored(path, data + begin, _TYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
    if not 0 <= begin <= end == begin + _numel(stored.shape) * stored.dtype.itemsize:
        raise _damaged(path, f"{name} has {end - begin:,} bytes, not what its shape takes")
    if data + end > num_bytes:
        raise _damaged(path, f"{name} ends at byte {data + end:,} of {num_bytes:,}")
    return stored


def _fill(held: Tensor, stored: Stored, skip: int) -> None:
    """Read a contiguous tensor from a file, `skip` bytes after where the stored one begins."""
    left = held.view(-1).view(torch.uint8).numpy().data
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.begin + skip)
            while left:
                count = file.readinto(left)
                if not count:
                    raise _damaged(stored.path, f"{len(left):,} bytes are missing")
                left = left[count:]
    except OSError as error:
        raise _damaged(stored.path, str(error.strerror)) from None


def _damaged(path: Path, how: str) -> BadFileError:
    return BadFileError(f"{path} cannot be read: {how}", "was the file cut off? fetch it again")


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product

"""Counts in a file, so that parts counted on several machines can be brought together."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.model import Affinity
from placer.errors import BadFileError
from placer.files import atomic_path, nothing_at

FORMAT = "placer.affinity"
SCHEMA_VERSION = 1

_TABLES = {
    "layer_ids": np.int64,
    "coactivation": np.int64,
    "affinity": np.float64,
    "primary_affinity": np.int64,
    "primary_pairs": np.int64,
    "k_histogram": np.int64,
}


def write_affinity(affinity: Affinity, path: Path, *, force: bool = False) -> None:
    """Write counts as a compressed .npz whose keys are the attributes of `Affinity`."""
    tables: dict[str, Any] = {name: getattr(affinity, name) for name in _TABLES}
    with atomic_path(path, force=force) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, format=FORMAT, schema_version=SCHEMA_VERSION, **tables)


def read_affinity(path: Path) -> Affinity:
    """Read what `write_affinity` wrote.

    Raises:
        BadFileError: missing, damaged, of another format, or of a newer version.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise BadFileError(f"{path} is not a {FORMAT} file")
        with file:
            _check_format(path, file)
            tables = {name: _table(path, file, name) for name in _TABLES}
    except FileNotFoundError:
        raise nothing_at(path) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadFileError(f"{path} cannot be read: {error}", "count the trace anew") from None
    try:
        return Affinity(**tables)
    except (ValueError, IndexError) as error:
        raise BadFileError(f"{path} is damaged: {error}", "count the trace anew") from None


def _check_format(path: Path, file: np.lib.npyio.NpzFile) -> None:
    found = str(file["format"]) if "format" in file else None
    if found != FORMAT:
        raise BadFileError(f"{path} is not a {FORMAT} file (its format says {found!r})")
    version = int(file["schema_version"]) if "schema_version" in file else 0
    if version < 1:
        raise BadFileError(f"{path} has schema_version {version}, expected 1..{SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise BadFileError(
            f"{path} has schema_version {version}, this placer reads up to {SCHEMA_VERSION}",
            "install a newer moe-placer",
        )


def _table(path: Path, file: np.lib.npyio.NpzFile, name: str) -> NDArray[Any]:
    if name not in file:
        raise BadFileError(f"{path} lacks {name}", "count the trace anew")
    table = file[name]
    if table.dtype != _TABLES[name]:
        raise BadFileError(f"{path}: {name} has type {table.dtype}, expected {_TABLES[name]}")
    return table

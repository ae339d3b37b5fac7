"""`LoadRecord`: how often each expert was used, where nobody recorded which token used which.

Load balancers record this and no more. It is enough to balance ranks; it says nothing of which
experts fire together or follow each other, so that neither co-activation nor affinity nor traffic
can be known from it. Kept in a file of its own kind, an .npz:

| key | shape, type | |
| --- | --- | --- |
| format, schema_version | scalars | "placer.load", 1 |
| load | [windows, layers, experts] int64 | token-expert pairs of each recorded window, in time |
| layer_ids | [layers] int64 | real layer numbers, increasing |
| source | scalar string | where it came from, a JSON document |
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import BadFileError, UsageError
from placer.files import atomic_path, nothing_at

FORMAT = "placer.load"
SCHEMA_VERSION = 1
WHY_NO_AFFINITY = (
    "it says how often each expert was used, not which token used which, so co-activation, "
    "affinity and traffic cannot be known from it"
)
_HINT = "placer solve FILE --objective balance; for the rest, record tokens (docs/engines/)"


@dataclass(frozen=True, eq=False)
class LoadRecord:
    """Load of every expert in windows of time; build one with `make_load`.

    Attributes:
        load: [B, L, E] int64 token-expert pairs in each of B windows (a forward pass, an interval).
        layer_ids: [L] int64 real layer numbers, increasing.
        source: where it came from; any JSON document.
    """

    load: NDArray[np.int64]
    layer_ids: NDArray[np.int64]
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def num_windows(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[2])

    @property
    def num_pairs(self) -> int:
        """Token-expert pairs over all windows and layers."""
        return int(self.load.sum())

    def fingerprint(self) -> str:
        """Hex digest of the load and the layer ids."""
        digest = hashlib.sha256(f"{self.load.shape} {self.layer_ids.tolist()}\n".encode())
        digest.update(np.ascontiguousarray(self.load, "<i8").tobytes())
        return digest.hexdigest()


def make_load(
    load: NDArray[Any],
    *,
    layer_ids: NDArray[Any] | list[int] | None = None,
    source: dict[str, Any] | None = None,
    where: str,
) -> LoadRecord:
    """Check counts and build a `LoadRecord`.

    Args:
        load: [B, L, E], or [L, E] for one window; whole numbers of any type. Windows without any
            load are left out.
        layer_ids: [L] real layer numbers; default 0..L-1.
        source: where it came from.
        where: name of the file, for messages.

    Raises:
        BadFileError: says what is wrong.
    """
    counts = np.asarray(load)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or 0 in counts.shape[1:]:
        raise BadFileError(
            f"{where}: the load has shape {np.shape(load)}, expected [layers, experts] "
            "or [windows, layers, experts]"
        )
    if counts.dtype.kind not in "iuf":
        raise BadFileError(f"{where}: the load holds {counts.dtype}, expected counts")
    if counts.dtype.kind == "f" and not (
        np.isfinite(counts).all() and (counts == np.floor(counts)).all()
    ):
        raise BadFileError(f"{where}: the load holds values that are no whole numbers")
    if counts.size and counts.min() < 0:
        raise BadFileError(f"{where}: the load holds {counts.min()}, expected 0 or more")
    if counts.size and counts.max() > np.iinfo(np.int64).max // max(1, counts.size):
        raise BadFileError(f"{where}: the load holds {counts.max()}, more than can be added up")
    table: NDArray[np.int64] = counts.astype(np.int64)
    table = table[table.any(axis=(1, 2))]
    if not len(table):
        raise BadFileError(
            f"{where} holds no load at all", "was anything served while it recorded?"
        )
    from placer.trace.checks import check_layer_ids

    ids = np.arange(table.shape[1]) if layer_ids is None else np.asarray(layer_ids)
    return LoadRecord(table, check_layer_ids(ids, table.shape[1], where), source or {})


def write_load(record: LoadRecord, path: Path, *, force: bool = False) -> None:
    """Write a load record, compressed."""
    with atomic_path(path, force=force) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            schema_version=np.int64(SCHEMA_VERSION),
            load=record.load,
            layer_ids=record.layer_ids,
            source=np.array(json.dumps(record.source)),
        )


def is_load(path: Path) -> bool:
    """Whether a load record lies at `path`, sound or not."""
    try:
        with zipfile.ZipFile(path) as archive:
            if "format.npy" not in archive.namelist():
                return False
            with archive.open("format.npy") as file:
                named = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    return bool(named.dtype.kind == "U" and str(named) == FORMAT)


def read_load(path: Path) -> LoadRecord:
    """Read and check a load record.

    Raises:
        BadFileError: missing, damaged, of a newer version, or unsound.
    """
    if not path.is_file():
        raise nothing_at(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise BadFileError(
            f"{path} is damaged: {error}", "was the file truncated? import it anew"
        ) from None
    missing = {"format", "schema_version", "load", "layer_ids"} - arrays.keys()
    if missing or str(arrays["format"]) != FORMAT:
        raise BadFileError(f"{path} is not a {FORMAT} file")
    version = arrays["schema_version"]
    if version.dtype.kind not in "iu" or version.size != 1 or int(version) < 1:
        raise BadFileError(f"{path}: schema_version is no number, expected {SCHEMA_VERSION}")
    if int(version) > SCHEMA_VERSION:
        raise BadFileError(
            f"{path} has schema_version {int(version)}, this placer reads up to {SCHEMA_VERSION}",
            "install a newer moe-placer",
        )
    return make_load(
        arrays["load"],
        layer_ids=arrays["layer_ids"],
        source=_source(arrays.get("source"), path),
        where=str(path),
    )


def inspect_load(path: Path) -> dict[str, Any]:
    """What a load record holds, as a JSON document.

    Raises:
        BadFileError: as `read_load`.
    """
    record = read_load(path)
    total = record.load.sum(axis=0)
    mean = total.mean(axis=1)
    hottest = np.divide(total.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)
    return {
        "kind": "load",
        "path": str(path),
        "sound": True,
        "windows": record.num_windows,
        "layers": record.num_layers,
        "layer_ids": record.layer_ids.tolist(),
        "experts": record.num_experts,
        "pairs": record.num_pairs,
        "hottest_expert": {"mean": float(hottest.mean()), "max": float(hottest.max())},
        "source": record.source,
        "fingerprint": record.fingerprint(),
        "not_known": WHY_NO_AFFINITY,
    }


def refuse_load(path: Path) -> UsageError:
    """What to raise where a trace is needed and a load record was given."""
    return UsageError(f"{path} is a load record: {WHY_NO_AFFINITY}", _HINT)


def _source(value: NDArray[Any] | None, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        document = json.loads(str(value))
    except json.JSONDecodeError as error:
        raise BadFileError(f"{path}: source is not JSON: {error.msg}") from None
    return document if isinstance(document, dict) else {}

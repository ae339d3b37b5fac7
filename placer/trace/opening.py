"""`open_trace`: whatever kind of trace lies at a path, as a `TraceSource`."""

from __future__ import annotations

from pathlib import Path

from placer.errors import BadFileError
from placer.files import nothing_at
from placer.trace.load import is_load, refuse_load
from placer.trace.memory import MemorySource
from placer.trace.npz import load_npz
from placer.trace.source import TraceSource

_MANIFEST = "manifest.json"


def may_be_trace(path: Path) -> bool:
    """Whether a trace, whole or damaged, may lie at `path`, or nothing; not for sure."""
    if not path.is_file() or path.suffix in (".npz", ".parquet", ".json"):
        return True
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # as .npz files do


def open_trace(path: Path | str) -> TraceSource:
    """Open a native trace (its folder or its manifest) or an interchange trace (an .npz file).

    Raises:
        BadFileError: missing, damaged, or neither of these.
        UsageError: a load record (see `placer.trace.load`), which holds no tokens.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> TraceSource:
    if path.name == _MANIFEST:
        path = path.parent
    if path.is_dir():
        from placer.trace.native import NativeSource

        return NativeSource(path)
    if not path.exists():
        raise nothing_at(path, "expected a trace: a folder or an .npz file")
    if path.suffix == ".parquet":
        raise BadFileError(
            f"{path} may be a part of a trace, but is not a whole one",
            f"give the folder that it lies in: {path.parent}",
        )
    if is_load(path):
        raise refuse_load(path)
    if path.suffix == ".json" or not may_be_trace(path):
        raise BadFileError(
            f"{path} is no trace: it is neither a folder nor an .npz file",
            "give the folder that placer trace or placer import wrote; docs/traces.md has the rest",
        )
    trace, unknown = load_npz(path)
    source = MemorySource(trace, path=path)
    if unknown:
        source.warnings.append(f"keys that placer does not know: {', '.join(unknown)}")
    return source

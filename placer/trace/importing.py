"""Making a native trace in one go: all of it, or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from placer.errors import PlacerError, UsageError
from placer.trace import layout
from placer.trace.model import Trace
from placer.trace.npz import load_npz
from placer.trace.store import TraceWriter


@dataclass(frozen=True)
class ImportSummary:
    """What an import made.

    Attributes:
        path: the native trace.
        tokens, requests, layers, experts, top_k: its size.
        has_weights: whether it has gate weights.
        warnings: what a user should know, a sentence each.
    """

    path: Path
    tokens: int
    requests: int
    layers: int
    experts: int
    top_k: int
    has_weights: bool
    warnings: list[str]


def import_npz(file: Path, output: Path, *, force: bool = False) -> ImportSummary:
    """Make a native trace of an interchange trace."""
    file, output = Path(file), Path(output)
    with new_trace_folder(output, force=force) as folder:
        trace, unknown = load_npz(file)
        write_trace(trace, folder, source={"imported_from": file.name, "importer": "npz"})
    warnings = [f"keys that placer does not know: {', '.join(unknown)}"] if unknown else []
    return ImportSummary(
        path=output,
        tokens=trace.num_tokens,
        requests=int(trace.requests().size),
        layers=trace.num_layers,
        experts=trace.num_experts,
        top_k=trace.top_k,
        has_weights=trace.weights is not None,
        warnings=warnings,
    )


def write_trace(
    trace: Trace, folder: Path, *, force: bool = False, source: dict[str, object] | None = None
) -> None:
    """Write a trace in memory as a native trace."""
    with TraceWriter(
        folder,
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        top_k=trace.top_k,
        model=trace.model,
        weights=trace.weights is not None,
        step=trace.step is not None,
        home=trace.home is not None,
        part_tokens=min(65536, max(1, trace.num_tokens)),
        force=force,
        source=source,
    ) as writer:
        writer.append_trace(trace)


@contextlib.contextmanager
def new_trace_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `output`; put it in its place when the block succeeds.

    When the block raises (Ctrl-C included), the folder is removed and `output` is as it was.
    With `force`, a trace at `output` is replaced; other files in it stay.
    """
    if output.exists():
        if not output.is_dir():
            raise UsageError(f"{output} is a file, expected a folder for a trace")
        if any(output.iterdir()) and not force:
            raise UsageError(
                f"{output} exists already and is not empty",
                "give another path, or --force to replace the trace in it",
            )
    elif not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist", f"mkdir -p {output.parent}")
    # resolved, so that "." and links have a sibling too
    target = output.resolve()
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise PlacerError(f"{output} cannot be written: {error}") from None
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path) -> None:
    if target.exists():
        layout.clear(target)
        if any(target.iterdir()):  # other files: the trace moves in beside them, manifest last
            for path in reversed(layout.own_files(temporary)):
                os.replace(path, target / path.name)
            return
        target.rmdir()
    os.replace(temporary, target)

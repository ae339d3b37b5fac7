"""`TraceWriter`: writes a native trace part by part while the model runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from placer.errors import BadFileError, PlacerError, UsageError
from placer.trace import columns, layout
from placer.trace.buffer import TokenBuffer
from placer.trace.checks import (
    check_per_token,
    check_phase,
    check_routing,
    expert_table,
)
from placer.trace.labels import add_label
from placer.trace.model import ModelDims, Trace


class TraceWriter:
    """Appends tokens to a native trace; use it as a context manager.

    Tokens gather in memory until `part_tokens` of them make a part, which is written under a
    temporary name and renamed: a crash, even kill -9, loses at most the tokens in memory. When
    the block raises, what is in memory is still written, but the stream is not marked whole.

    Several ranks may write into one folder at once, each through a writer of its own with its
    own `rank`; any set of ranks will do. They must describe the same trace (`source` aside,
    where the first one stays). `force` replaces a trace that is there already: only rank 0 may
    do that, and it must be open before the other ranks open (put a barrier between).

    Not for use by several threads at once.

    Args:
        path: the folder; made when missing. A folder that holds other files but no trace is
            refused without `force`; other files are never removed.
        num_experts: E.
        layer_ids: [L] real layer numbers, increasing.
        top_k: the most experts that a token may use in one layer (K).
        model: dimensions of the model.
        weights, step, home: whether these are recorded; if so, each `append` must bring them.
        rank: number of this stream.
        part_tokens: tokens in a part.
        force: replace a trace that is there.
        source: where the trace comes from; any JSON document, kept in the manifest.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_experts: int,
        layer_ids: Sequence[int] | NDArray[np.int64],
        top_k: int,
        model: ModelDims | None = None,
        weights: bool = False,
        step: bool = True,
        home: bool = False,
        rank: int = 0,
        part_tokens: int = 65536,
        force: bool = False,
        source: dict[str, Any] | None = None,
    ) -> None:
        if rank < 0:
            raise UsageError(f"rank is {rank}, expected 0 or more")
        if part_tokens < 1:
            raise UsageError(f"part_tokens is {part_tokens}, expected 1 or more")
        self.path = Path(path)
        self.rank = rank
        self.num_tokens = 0
        self.num_parts = 0
        self._manifest = layout.make_manifest(
            ModelDims() if model is None else model,
            num_experts=int(num_experts),
            layer_ids=[int(layer) for layer in layer_ids],
            top_k=int(top_k),
            weights=weights,
            step=step,
            home=home,
            source=source,
        )
        self._layer_ids = self._manifest.layers()
        self._where = f"trace for {self.path}"
        self._labels: dict[int, str] = {}
        self._buffer = TokenBuffer(self._manifest, part_tokens)
        self._open = True
        try:
            _open_folder(self.path, rank, force)
            layout.join_manifest(self.path, self._manifest, rank)
            layout.claim(self.path, rank)
        except OSError as error:
            raise PlacerError(f"{self.path} cannot be written: {error}") from error

    def append(
        self,
        *,
        experts: ArrayLike,
        request: ArrayLike,
        position: ArrayLike,
        phase: ArrayLike,
        step: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        home: ArrayLike | None = None,
        labels: Sequence[str | None] | None = None,
    ) -> None:
        """Add t tokens, after the same checks as `make_trace`. The arrays are copied.

        Args:
            experts: [t, L, k] logical ids, k up to `top_k`; -1 = unused.
            request, position, phase: [t].
            step, home: [t], exactly when the writer records them.
            weights: shaped as `experts`, exactly when the writer records them.
            labels: [t] label of each token's request, or None for no labels.
        """
        if not self._open:
            raise UsageError(f"the writer of {self.path} is closed")
        for name, value in (("weights", weights), ("step", step), ("home", home)):
            if getattr(self._manifest, name) != (value is not None):
                told = "records" if value is None else "does not record"
                raise UsageError(
                    f"{self._where} {told} {name}, but append was called "
                    f"{'without' if value is None else 'with'} it"
                )
        table = expert_table(experts, self._where)
        if table.shape[1] != len(self._layer_ids):
            raise BadFileError(
                f"{self._where}: experts has {table.shape[1]} layers, "
                f"expected {len(self._layer_ids)}"
            )
        num_tokens, first = len(table), self.num_tokens
        if num_tokens == 0:
            return
        checked, gates = check_routing(
            table,
            self._manifest.num_experts,
            self._layer_ids,
            self._where,
            weights=weights,
            first_token=first,
        )
        top_k = self._manifest.top_k
        if checked.shape[2] > top_k:
            excess = np.argwhere(checked[:, :, top_k] >= 0)
            if excess.size:
                token, layer = (int(i) for i in excess[0])
                raise BadFileError(
                    f"{self._where}: token {first + token} uses more than {top_k} experts in "
                    f"layer {self._layer_ids[layer]}"
                )
            checked = checked[:, :, :top_k]
            gates = None if gates is None else gates[:, :, :top_k]
        arrays: dict[str, NDArray[Any] | None] = {
            "experts": checked,
            "weights": gates,
            "phase": check_phase(phase, num_tokens, self._where, first),
        }
        per_token = {"request": request, "position": position, "step": step, "home": home}
        for name, value in per_token.items():
            arrays[name] = (
                None
                if value is None
                else check_per_token(name, value, num_tokens, self._where, first)
            )
        if labels is not None:
            requests = arrays["request"]
            assert requests is not None
            self._check_labels(requests, labels)
        start = 0
        while start < num_tokens:
            taken = self._buffer.take(arrays, labels, start, num_tokens)
            start += taken
            self.num_tokens += taken
            if self._buffer.is_full:
                self._write_part()

    def append_trace(self, trace: Trace) -> None:
        """Add all tokens of a trace, with what the writer records; the rest is left aside."""
        if trace.num_experts != self._manifest.num_experts or not np.array_equal(
            trace.layer_ids, self._layer_ids
        ):
            raise UsageError(
                f"{self._where} is about {self._manifest.num_experts} experts in layers "
                f"{self._layer_ids.tolist()}, the trace about {trace.num_experts} in "
                f"{trace.layer_ids.tolist()}"
            )
        labels: list[str | None] | None = None
        if trace.labels:
            ids, index = np.unique(trace.request, return_inverse=True)
            names = np.array([trace.labels.get(request) for request in ids.tolist()], object)
            labels = names[index].tolist()
        self.append(
            experts=trace.experts,
            request=trace.request,
            position=trace.position,
            phase=trace.phase,
            step=trace.step if self._manifest.step else None,
            weights=trace.weights if self._manifest.weights else None,
            home=trace.home if self._manifest.home else None,
            labels=labels,
        )

    def flush(self) -> None:
        """Write the tokens in memory as a part, be it a small one."""
        if self._buffer.filled:
            self._write_part()

    def close(self) -> None:
        """Write what is in memory and mark this rank's stream as whole."""
        if not self._open:
            return
        self.flush()
        self._open = False
        layout.write_closed(self.path, self.rank, tokens=self.num_tokens, parts=self.num_parts)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(PlacerError):  # the error that ended the block matters more
            self.flush()
        self._open = False

    def _check_labels(self, request: NDArray[Any], labels: Sequence[str | None]) -> None:
        """One label for each token, and the same one for all tokens of a request."""
        if len(labels) != len(request):
            raise BadFileError(
                f"{self._where}: {len(labels)} labels for {len(request)} tokens, expected one each"
            )
        for request_id, label in set(zip(request.tolist(), labels, strict=True)):
            if label is not None and not isinstance(label, str):
                raise BadFileError(
                    f"{self._where}: the label of request {request_id} is {label!r}, "
                    "expected a string"
                )
            if label:
                add_label(self._labels, request_id, label, self._where)

    def _write_part(self) -> None:
        name = layout.part_name(self.rank, self.num_parts)
        temporary = self.path / f".{name}.tmp"
        try:
            with pq.ParquetWriter(
                temporary,
                columns.schema(self._manifest),
                **columns.writer_options(self._manifest),
            ) as file:
                for arrays, labels in self._buffer.row_groups():
                    file.write_table(columns.to_table(self._manifest, arrays, labels))
            os.replace(temporary, self.path / name)
        except (OSError, pa.ArrowException) as error:
            raise PlacerError(
                f"{self.path / name} cannot be written: {error}", "is the disk full?"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.num_parts += 1
        self._buffer.filled = 0


def _open_folder(path: Path, rank: int, force: bool) -> None:
    """Make the folder, or see that it may be written into."""
    if force and rank != 0:
        raise UsageError(
            f"rank {rank} may not replace a trace: other ranks may be writing already",
            "pass force on rank 0 alone, and open the other ranks after it",
        )
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected a folder for a trace", "give another path")
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"the folder {path.parent} does not exist", f"mkdir -p {path.parent}")
        path.mkdir(exist_ok=True)
        return
    if force:
        layout.clear(path)
        return
    written = {*layout.part_files(path), *layout.closed_ranks(path), *layout.claimed_ranks(path)}
    if rank in written:
        raise UsageError(
            f"{path} holds a trace already (rank {rank} has written to it)",
            "give another path, or --force to replace it",
        )
    if any(path.iterdir()) and not layout.own_files(path):
        raise UsageError(
            f"{path} exists already and holds other files, but no trace",
            "give another path, or --force to write beside them",
        )

"""`NativeSource`: reads a native trace, in chunks and with its checksums verified."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from placer.errors import BadFileError
from placer.trace import columns, layout
from placer.trace.checks import check_per_token, check_phase, check_routing, expert_dtype
from placer.trace.labels import add_label, labels_of_pairs
from placer.trace.model import Trace
from placer.trace.source import CHUNK_TOKENS, TraceSource, check_max_tokens
from placer.wording import counted

_HINT = "the file was cut short or changed after it was written; trace anew, or restore it"


@dataclass(frozen=True)
class _Part:
    path: Path
    first_token: int
    num_tokens: int


class NativeSource(TraceSource):
    """A native trace on disk, its tokens in the order of (rank, part, row)."""

    def __init__(self, folder: Path) -> None:
        manifest = layout.read_manifest(folder)
        self.path: Path = folder
        self.manifest = manifest
        self.num_experts = manifest.num_experts
        self.layer_ids = manifest.layers()
        self.top_k = manifest.top_k
        self.model = manifest.dims()
        self.has_weights = manifest.weights
        self.has_step = manifest.step
        self.has_home = manifest.home
        self.warnings = []
        self._parts: list[_Part] = []
        self.num_tokens = 0
        closed = layout.closed_ranks(folder)
        parts = layout.part_files(folder)
        ranks = sorted({*closed, *parts, *layout.claimed_ranks(folder)})
        self.ranks = ranks
        self.complete = closed.issuperset(ranks)
        expected = columns.schema(manifest)
        for rank in ranks:
            self._open_rank(rank, parts.get(rank, {}), rank in closed, expected)
        if self.num_tokens == 0:
            raise BadFileError(
                f"{folder} holds no tokens", "was the run that it records cut off at once?"
            )

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    def _open_rank(
        self, rank: int, files: dict[int, Path], is_closed: bool, expected: pa.Schema
    ) -> None:
        """Take up the parts of one rank, after holding them against its own account."""
        promised: int | None = None
        num_parts = max(files) + 1 if files else 0
        if is_closed:
            promised, num_parts = layout.read_closed(self.path, rank)
            extra = [path for number, path in files.items() if number >= num_parts]
            if extra:
                raise BadFileError(
                    f"{extra[0]} is too many: rank {rank} says that it wrote "
                    f"{counted(num_parts, 'part')}",
                    "do not mix the parts of different traces in a folder",
                )
        for number in range(num_parts):
            if number not in files:
                raise BadFileError(
                    f"{self.path / layout.part_name(rank, number)} is missing, "
                    f"expected parts 0..{num_parts - 1} of rank {rank}",
                    "restore the file, or trace anew",
                )
        tokens = 0
        for path in files.values():
            count = _check_footer(path, expected)
            self._parts.append(_Part(path, self.num_tokens, count))
            self.num_tokens += count
            tokens += count
        if promised is not None and tokens != promised:
            raise BadFileError(
                f"{self.path}: the parts of rank {rank} hold {tokens} tokens, "
                f"expected {promised} as {layout.closed_name(rank)} says",
                "do not mix the parts of different traces in a folder",
            )
        if promised is None:
            self.warnings.append(
                f"rank {rank} is unfinished (still writing, or cut off): "
                f"{tokens} of its tokens are there"
            )

    def chunks(
        self, max_tokens: int = CHUNK_TOKENS, *, with_weights: bool = True
    ) -> Iterator[Trace]:
        check_max_tokens(max_tokens)
        weights = self.has_weights and with_weights
        names = [*columns.token_columns(self.manifest), "label"]
        names += columns.experts_columns(self.manifest)
        if weights:
            names += columns.weights_columns(self.manifest)
        for part in self._parts:
            first = part.first_token
            for batch in _batches(part, names, max_tokens):
                yield self._trace(batch, weights, f"{part.path}", first - part.first_token)
                first += len(batch)

    def token_columns(self, names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
        for part in self._parts:
            for batch in _batches(part, list(names), CHUNK_TOKENS):
                yield {
                    name: columns.read_numbers(batch.column(name), f"{part.path}: {name}")
                    for name in names
                }

    def request_labels(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for part in self._parts:
            for batch in _batches(part, ["request", "label"], CHUNK_TOKENS):
                for request, label in _labels(batch, str(part.path)).items():
                    add_label(found, request, label, str(part.path))
        return found

    def _trace(self, batch: pa.RecordBatch, weights: bool, where: str, first_row: int) -> Trace:
        """A batch of rows as a trace, checked as any input is."""
        num_tokens, shape = len(batch), (len(batch), self.num_layers, self.top_k)
        experts = np.empty(shape, expert_dtype(self.num_experts))
        gates = np.empty(shape, np.float32) if weights else None
        gate_names = columns.weights_columns(self.manifest)
        for layer, name in enumerate(columns.experts_columns(self.manifest)):
            lengths = columns.read_list(
                batch.column(name), experts[:, layer], -1, f"{where}: {name}"
            )
            if gates is None:
                continue
            name = gate_names[layer]
            others = columns.read_list(batch.column(name), gates[:, layer], 0, f"{where}: {name}")
            if not _same_lengths(lengths, others):
                raise BadFileError(f"{where}: {name} has lists of other lengths than the experts")
        checked, gates = check_routing(
            experts, self.num_experts, self.layer_ids, where, weights=gates, first_token=first_row
        )
        numbers = {
            name: columns.read_numbers(batch.column(name), f"{where}: {name}").copy()
            for name in columns.token_columns(self.manifest)
        }
        per_token = {
            name: check_per_token(name, numbers[name], num_tokens, where, first_row)
            for name in numbers
            if name != "phase"
        }
        return Trace(
            experts=checked,
            num_experts=self.num_experts,
            layer_ids=self.layer_ids,
            phase=check_phase(numbers["phase"], num_tokens, where, first_row),
            weights=gates,
            labels=_labels(batch, where),
            model=self.model,
            **per_token,
        )


def _check_footer(path: Path, expected: pa.Schema) -> int:
    """The number of rows of a part that can be opened and has the right columns."""
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            count = int(file.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise BadFileError(f"{path} is not a readable Parquet file: {error}", _HINT) from None
    for field in expected:
        if field.name not in found.names:
            raise BadFileError(f"{path} has no column {field.name}", _HINT)
        kind = found.field(field.name).type
        if not columns.same_type(kind, field.type):
            raise BadFileError(f"{path}: column {field.name} is {kind}, expected {field.type}")
    return count


def _batches(part: _Part, names: list[str], max_tokens: int) -> Iterator[pa.RecordBatch]:
    """The rows of a part, `max_tokens` at a time, page checksums verified."""
    rows = 0
    try:
        with pq.ParquetFile(part.path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=max_tokens, columns=names):
                if len(batch):
                    rows += len(batch)
                    yield batch
    except (OSError, pa.ArrowException) as error:
        raise BadFileError(f"{part.path} is damaged: {error}", _HINT) from None
    if rows != part.num_tokens:
        raise BadFileError(f"{part.path} gave {rows} rows, expected {part.num_tokens}", _HINT)


def _labels(batch: pa.RecordBatch, where: str) -> dict[int, str]:
    """Request id -> label of the requests in a batch."""
    label = batch.column("label")
    if label.null_count == len(label):
        return {}
    names = label.dictionary.to_pylist()
    codes = label.indices.fill_null(-1).to_numpy()
    requests = columns.read_numbers(batch.column("request"), f"{where}: request")
    if codes.max() >= len(names):
        raise BadFileError(f"{where}: label {codes.max()} is not among the {len(names)} labels")
    labelled = codes >= 0
    ids, index = np.unique(requests[labelled], return_inverse=True)
    pairs = np.unique(index * len(names) + codes[labelled])
    return labels_of_pairs(
        ids[pairs // len(names)], [names[code] for code in (pairs % len(names)).tolist()], where
    )


def _same_lengths(first: NDArray[np.int64] | None, second: NDArray[np.int64] | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(np.array_equal(first, second))

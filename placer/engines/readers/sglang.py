"""SGLang's expert distribution recorder.

`--expert-distribution-recorder-mode stat | stat_approx | per_pass | per_token`; files as
`sglang/srt/eplb/expert_distribution.py` writes them (SGLang 0.5.23):

- stat, stat_approx: `logical_count` [windows, layers, experts], summed over ranks;
- per_pass: per rank a list of records with `global_physical_count` [layers, slots];
- per_token: the same with `topk_ids_of_layer` [layers, tokens, 8], slots that tokens went to.

Slots become logical experts by `last_physical_to_logical_map` of the same file.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import (
    as_counts,
    files_of,
    load_torch,
    moe_layers,
    number_of_experts,
)
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError
from placer.trace.checks import make_trace
from placer.trace.load import make_load
from placer.trace.model import DECODE, PREFILL
from placer.wording import counted

_DECODE, _IDLE = 2, 4  # ForwardMode of sglang/srt/model_executor/forward_batch_info.py


def read(path: Path, hints: Hints) -> Recorded:
    """Read one file of the recorder, or those of all ranks in a folder."""
    files = files_of(path, "*.pt")
    packs = [(file, load_torch(file)) for file in files]
    kinds = {_kind(file, pack) for file, pack in packs}
    if len(kinds) > 1:
        raise BadFileError(
            f"{path} holds files of several recorder modes: {', '.join(sorted(kinds))}",
            "give the files of one recording",
        )
    kind = kinds.pop()
    if kind == "stat":
        return _read_stat(path, packs, hints)
    if kind == "per_token":
        return _read_per_token(path, packs, hints)
    return _read_per_pass(path, packs, hints)


def _kind(file: Path, pack: Any) -> str:
    if isinstance(pack, dict) and "logical_count" in pack:
        return "stat"
    records = pack.get("records") if isinstance(pack, dict) else None
    if not isinstance(records, list) or "last_physical_to_logical_map" not in pack:
        raise BadFileError(
            f"{file} is not a file of SGLang's expert distribution recorder",
            "it has either logical_count, or records and last_physical_to_logical_map",
        )
    if not records:
        raise BadFileError(f"{file} holds no records", "was anything served while it recorded?")
    if not all(isinstance(record, dict) for record in records):
        raise BadFileError(f"{file}: records holds other things than records")
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def _read_stat(path: Path, packs: list[tuple[Path, Any]], hints: Hints) -> Recorded:
    counts = [
        as_counts(pack["logical_count"], f"{file}: logical_count", (3,)) for file, pack in packs
    ]
    if len({table.shape[1:] for table in counts}) > 1:
        raise BadFileError(f"{path}: the files are about different numbers of layers or experts")
    load = np.concatenate(counts)
    number_of_experts(hints, load.shape[2], str(path))
    rows, ids, warnings = moe_layers(load.any(axis=(0, 2)), hints, str(path))
    record = make_load(
        load[:, rows], layer_ids=ids, source={"importer": "sglang", "mode": "stat"}, where=str(path)
    )
    return Recorded(record, warnings)


def _read_per_pass(path: Path, packs: list[tuple[Path, Any]], hints: Hints) -> Recorded:
    load: dict[int, NDArray[np.int64]] = {}
    for file, pack in packs:
        table = _logical_of(pack, file)
        num_experts = number_of_experts(hints, int(table.max()) + 1, str(file))
        layer = np.arange(len(table))[:, None]
        for record in pack["records"]:
            physical = as_counts(
                _entry(record, "global_physical_count", file),
                f"{file}: global_physical_count",
                (2,),
            )
            if physical.shape != table.shape:
                raise BadFileError(
                    f"{file}: global_physical_count has shape {physical.shape}, the map of slots "
                    f"{table.shape}"
                )
            logical = np.zeros((len(table), num_experts), np.int64)
            np.add.at(logical, (np.broadcast_to(layer, table.shape), table), physical)
            number = int(_entry(record, "forward_pass_id", file))
            if number in load and load[number].shape != logical.shape:
                raise BadFileError(f"{file} is about another model than the files before it")
            load[number] = load.get(number, 0) + logical
    stacked = np.stack([load[number] for number in sorted(load)])
    rows, ids, warnings = moe_layers(stacked.any(axis=(0, 2)), hints, str(path))
    record = make_load(
        stacked[:, rows],
        layer_ids=ids,
        source={"importer": "sglang", "mode": "per_pass"},
        where=str(path),
    )
    return Recorded(record, warnings)


def _read_per_token(path: Path, packs: list[tuple[Path, Any]], hints: Hints) -> Recorded:
    streams: list[_Stream] = []
    warnings = []
    repeated = 0
    for file, pack in packs:
        stream = _stream(file, pack)
        if any(stream.same_tokens(other) for other in streams):
            repeated += 1
        elif len(stream.experts):
            streams.append(stream)
    if repeated:
        warnings.append(
            f"{counted(repeated, 'file holds', 'files hold')} the tokens of another rank "
            "(tensor parallelism)"
        )
    if not streams:
        raise BadFileError(f"{path} holds no tokens", "was anything served while it recorded?")
    num_experts = number_of_experts(hints, max(stream.num_experts for stream in streams), str(path))
    if len({stream.experts.shape[1:] for stream in streams}) > 1:
        raise BadFileError(f"{path}: the files are about different numbers of layers")
    experts = np.concatenate([stream.experts for stream in streams])
    rows, ids, notes = moe_layers((experts >= 0).any(axis=(0, 2)), hints, str(path))
    experts = experts[:, rows]
    used = (experts >= 0).any(axis=(0, 1))
    requests, shift = [], 0
    for stream in streams:
        requests.append(stream.request + shift)
        shift += int(stream.request.max()) + 1
    trace = make_trace(
        experts=experts[:, :, : int(np.flatnonzero(used)[-1]) + 1],
        num_experts=num_experts,
        layer_ids=ids,
        request=np.concatenate(requests),
        position=np.concatenate([stream.position for stream in streams]),
        phase=np.concatenate([stream.phase for stream in streams]),
        step=np.concatenate([stream.step for stream in streams]),
        home=np.concatenate([np.full(len(s.experts), s.rank) for s in streams])
        if len(streams) > 1
        else None,
        where=str(path),
    )
    warnings += [
        *notes,
        "SGLang records no request ids: tokens were joined to requests by their positions",
        "SGLang records no gate weights: the first expert of a token counts as its primary",
    ]
    return Recorded(trace, warnings)


class _Stream:
    """The tokens of one rank in order."""

    def __init__(self, rank: int, num_experts: int) -> None:
        self.rank = rank
        self.num_experts = num_experts
        self.experts: NDArray[np.integer] = np.empty((0, 0, 0), np.int32)
        self.request = self.position = self.phase = self.step = np.empty(0, np.int64)

    def same_tokens(self, other: _Stream) -> bool:
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("experts", "position", "step")
        )


def _stream(file: Path, pack: Any) -> _Stream:
    table = _logical_of(pack, file)
    joined = _Requests()
    columns: dict[str, list[NDArray[Any]]] = defaultdict(list)
    rank = 0
    for record in pack["records"]:
        rank = int(_entry(record, "rank", file))
        mode = int(_entry(record, "forward_mode", file))
        position = np.asarray(_entry(record, "positions", file), np.int64)
        slots = as_counts(
            _entry(record, "topk_ids_of_layer", file), f"{file}: topk_ids_of_layer", (3,)
        ).astype(np.int64)
        if slots.shape[:2] != (len(table), len(position)):
            raise BadFileError(
                f"{file}: topk_ids_of_layer has shape {slots.shape}, expected {len(table)} layers "
                f"x {len(position)} tokens"
            )
        if mode == _IDLE or not len(position):
            continue
        if slots.min() < -1 or slots.max() >= table.shape[1]:
            raise BadFileError(
                f"{file}: slot {slots.max()} of {table.shape[1]}: are shared experts fused with "
                "the routed ones?",
                "record with --disable-shared-experts-fusion",
            )
        layer = np.arange(len(table))[:, None, None]
        logical = np.where(slots >= 0, table[layer, np.maximum(slots, 0)], -1)
        lengths = record.get("extend_seq_lens")
        if mode == _DECODE or lengths is None:
            lengths = [1] * len(position)
        if sum(lengths) != len(position):
            raise BadFileError(
                f"{file}: extend_seq_lens add up to {sum(lengths)}, expected {len(position)} tokens"
            )
        request, grown = joined.join(position, lengths)
        decodes = (mode == _DECODE) | (grown & np.repeat([n == 1 for n in lengths], lengths))
        columns["experts"].append(logical.transpose(1, 0, 2))
        columns["request"].append(request)
        columns["position"].append(position)
        columns["phase"].append(np.where(decodes, DECODE, PREFILL))
        columns["step"].append(
            np.full(len(position), int(_entry(record, "forward_pass_id", file)), np.int64)
        )
    stream = _Stream(rank, int(table.max()) + 1)
    for name, parts in columns.items():
        setattr(stream, name, np.concatenate(parts))
    return stream


class _Requests:
    """Joins pieces of sequences by position: a piece goes on where an earlier one ended.

    Where several ended there, the one that has waited longest goes on, which keeps the order of
    the batch.
    """

    def __init__(self) -> None:
        self._ends: defaultdict[int, deque[int]] = defaultdict(deque)
        self._next = 0

    def join(
        self, position: NDArray[np.int64], lengths: list[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[t] requests of the tokens, and whether each one's piece went on with an earlier one."""
        request = np.empty(len(position), np.int64)
        grown = np.zeros(len(position), bool)
        ended: list[tuple[int, int]] = []
        at = 0
        for length in lengths:
            if not length:
                continue
            start = int(position[at])
            waiting = self._ends.get(start) if start else None
            if waiting:
                number = waiting.popleft()
                grown[at : at + length] = True
            else:
                number, self._next = self._next, self._next + 1
            request[at : at + length] = number
            ended.append((start + length, number))
            at += length
        for end, number in ended:
            self._ends[end].append(number)
        return request, grown


def _logical_of(pack: Any, file: Path) -> NDArray[np.int64]:
    """[layers, slots] logical expert of each slot."""
    table = as_counts(
        pack["last_physical_to_logical_map"], f"{file}: last_physical_to_logical_map", (2,)
    ).astype(np.int64)
    if not table.size or table.min() < 0:
        raise BadFileError(f"{file}: last_physical_to_logical_map holds no expert in some slot")
    return table


def _entry(record: dict[str, Any], key: str, file: Path) -> Any:
    if key not in record:
        raise BadFileError(f"{file}: a record has no {key}")
    return record[key]

"""vLLM's expert-load statistics: JSON lines (`expert_load_stats_config` with `output_dir`).

As `vllm/v1/worker/expert_load_stats.py: ExpertLoadReporter` writes them (on vLLM's main branch in
autumn 2026, not in 0.33.0): a file per rank, each with the tokens that the rank owns; a line per
layer and forward pass ("vllm.expert_load.iteration") where `trace` was on, and a line per layer
and interval ("vllm.expert_load"). Experts are logical.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import files_of, number_of_experts
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError
from placer.trace.load import make_load
from placer.wording import counted

_ITERATION, _INTERVAL = "vllm.expert_load.iteration", "vllm.expert_load"

_Counts = dict[tuple[int, int], NDArray[np.int64]]  # (window, layer) -> counts


def read(path: Path, hints: Hints) -> Recorded:
    """Read one rank's file or the folder of all; passes where they were traced, else intervals."""
    passes: _Counts = {}
    intervals: _Counts = {}
    warnings: list[str] = []
    for file in files_of(path, "*.jsonl"):
        of_file: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}
        records, cut_short = _records(file)
        if cut_short:
            warnings.append(f"the last line of {file.name} is cut short, left out")
        for where, record in records:
            counts = _counts(record, where)
            if counts is None:
                continue
            layer = _whole(record, "layer", where)
            if record["event"] == _ITERATION:
                _add(passes, (_whole(record, "iteration", where), layer), counts, where)
                continue
            # cumulative reports share their beginning: the last one holds all the others
            begin, end = _whole(record, "step_begin", where), _whole(record, "step_end", where)
            if end >= of_file.get((begin, layer), (-1, counts))[0]:
                of_file[begin, layer] = (end, counts)
        for key, (_, counts) in of_file.items():
            _add(intervals, key, counts, str(file))
    chosen = passes or intervals
    if not chosen:
        raise BadFileError(
            f"{path} holds no counts of vLLM's expert-load statistics",
            "record with detail per_expert",
        )
    if passes and intervals:
        warnings.append("forward passes were traced: the interval summaries are left aside")
    layers = sorted({layer for _, layer in chosen})
    numbers = sorted({window for window, _ in chosen})
    windows = [n for n in numbers if all((n, layer) in chosen for layer in layers)]
    if len(windows) < len(numbers):
        warnings.append(
            f"{counted(len(numbers) - len(windows), 'window lacks', 'windows lack')} some layer, "
            "left out"
        )
    if not windows:
        raise BadFileError(f"{path}: no window has all {len(layers)} layers")
    load = np.stack([np.stack([chosen[n, layer] for layer in layers]) for n in windows])
    number_of_experts(hints, load.shape[2], str(path))
    source = {"importer": "vllm-load", "windows": "forward passes" if passes else "intervals"}
    return Recorded(make_load(load, layer_ids=layers, source=source, where=str(path)), warnings)


def _records(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
    """The records of a file, each with its place, and whether the last line is cut short.

    It is where the engine was stopped while it wrote.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"{file} cannot be read: {error}") from None
    found: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and found:
                return found, True
            raise BadFileError(f"{file}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("event") not in (_ITERATION, _INTERVAL):
            raise BadFileError(f"{file}, line {number}: no record of vLLM's expert-load statistics")
        found.append((f"{file}, line {number}", record))
    return found, False


def _counts(record: dict[str, Any], where: str) -> NDArray[np.int64] | None:
    if "counts" not in record:
        return None
    counts = record["counts"]
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise BadFileError(f"{where}: counts must be a list of counts")
    return np.array(counts, np.int64)


def _whole(record: dict[str, Any], key: str, where: str) -> int:
    value = record.get(key)
    if type(value) is not int or value < 0:
        raise BadFileError(f"{where}: {key} is {value!r}, expected a number")
    return value


def _add(table: _Counts, key: tuple[int, int], counts: NDArray[np.int64], where: str) -> None:
    if key in table and table[key].shape != counts.shape:
        raise BadFileError(f"{where}: {len(counts)} experts, {len(table[key])} before")
    if any(other.shape != counts.shape for other in list(table.values())[:1]):
        raise BadFileError(f"{where}: {len(counts)} experts, other layers have another number")
    table[key] = table[key] + counts if key in table else counts

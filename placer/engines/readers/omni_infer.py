"""omni-infer's activation dumps: `activation_counts_recordstep_<step>_rank_<rank>.txt`.

A line per MoE layer, a tab-separated count per slot of that rank (omni_placement, `dump_dir`);
newer versions let rank 0 write all slots. Prefill and decode are dumped into folders of their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import moe_layers
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError, UsageError
from placer.trace.load import make_load
from placer.wording import counted

_NAME = re.compile(r"activation_counts_recordstep_(\d+)_rank_(\d+)\.txt")


def read(path: Path, hints: Hints) -> Recorded:
    """Read a folder of dumps; a step is a window, the slots of the ranks follow one another."""
    if not path.is_dir():
        raise BadFileError(f"{path} is not a folder, expected the one that dump_dir names")
    steps: defaultdict[int, dict[int, Path]] = defaultdict(dict)
    for file in path.iterdir():
        if match := _NAME.fullmatch(file.name):
            steps[int(match[1])][int(match[2])] = file
    if not steps:
        below = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise BadFileError(
            f"{path} holds no activation_counts_recordstep_*_rank_*.txt",
            f"give one of its folders: {', '.join(below)}" if below else "",
        )
    ranks = set().union(*steps.values())
    windows, dropped = [], 0
    for step in sorted(steps):
        if steps[step].keys() != ranks:  # the dump was cut off
            dropped += 1
            continue
        of_ranks = [_counts(steps[step][rank]) for rank in sorted(ranks)]
        if len({len(counts) for counts in of_ranks}) > 1:
            raise BadFileError(f"{path}: the files of step {step} differ in their layers")
        windows.append(np.concatenate(of_ranks, axis=1))
    lacking = f"{counted(dropped, 'step lacks', 'steps lack')} the file of some rank, left out"
    warnings = [lacking] if dropped else []
    if len({window.shape for window in windows}) > 1:
        raise BadFileError(f"{path}: the steps differ in their numbers of layers or slots")
    if not windows:
        raise BadFileError(f"{path}: no step has the files of all {len(ranks)} ranks")
    load = np.stack(windows)
    num_slots = load.shape[2]
    if hints.num_experts not in (None, num_slots):
        raise UsageError(
            f"{path} counts {num_slots} slots, --num-experts says {hints.num_experts}: with "
            "redundant experts, slots cannot be told apart",
            "dump without redundant experts",
        )
    rows, ids, notes = moe_layers(load.any(axis=(0, 2)), hints, str(path))
    if hints.num_experts is None:
        notes.append(f"slots were taken for experts 0..{num_slots - 1} in order (none redundant)")
    if hints.layer_ids is None:
        notes.append("layers are numbered from 0: omni-infer counts MoE layers (--layer-ids)")
    record = make_load(
        load[:, rows], layer_ids=ids, source={"importer": "omni-infer"}, where=str(path)
    )
    return Recorded(record, warnings + notes)


def _counts(file: Path) -> NDArray[np.int64]:
    """[layers, slots of the rank]"""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [[int(value) for value in line] for line in lines if line]
    except (OSError, ValueError) as error:
        raise BadFileError(f"{file} is not a table of counts: {error}") from None
    if not rows or len({len(row) for row in rows}) > 1:
        raise BadFileError(f"{file}: its lines differ in length", "was it truncated?")
    return np.array(rows, np.int64)

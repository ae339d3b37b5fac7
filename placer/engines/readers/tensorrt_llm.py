"""TensorRT-LLM's expert statistics (EXPERT_STATISTIC_ITER_RANGE, EXPERT_STATISTIC_PATH).

`tensorrt_llm/_torch/expert_statistic.py` (1.2) writes `meta_info.json` and, per rank,
`rank<N>.safetensors` with a count vector [experts] under "<iteration>_<layer>". A variant
that keeps raw data writes `token_selected_experts_rank<N>.safetensors` beside it: [tokens, k] under
the same names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import load_safetensors, number_of_experts
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError
from placer.trace.checks import make_trace
from placer.trace.load import make_load
from placer.wording import counted

_COUNTS = re.compile(r"rank(\d+)\.safetensors")
_RAW = re.compile(r"token_selected_experts_rank(\d+)\.safetensors")
_KEY = re.compile(r"(\d+)_(\d+)")

_Tables = dict[tuple[int, int], NDArray[Any]]  # (iteration, layer) -> what was recorded


def read(path: Path, hints: Hints) -> Recorded:
    """Read a folder of statistics: tokens where they were kept, else load, summed over ranks."""
    if not path.is_dir():
        raise BadFileError(f"{path} is not a folder, expected the one EXPERT_STATISTIC_PATH names")
    num_experts = number_of_experts(hints, _meta_info(path)["num_experts"], str(path))
    raw, counts = _ranks(path, _RAW), _ranks(path, _COUNTS)
    if raw:
        return _read_tokens(path, raw, num_experts)
    if not counts:
        raise BadFileError(f"{path} holds no rank*.safetensors", "did the iteration range end?")
    return _read_counts(path, counts, num_experts)


def _read_counts(path: Path, files: dict[int, Path], num_experts: int) -> Recorded:
    tables: _Tables = {}
    for file in files.values():
        for key, counts in _tables(file).items():
            if counts.shape != (num_experts,):
                raise BadFileError(
                    f"{file}: {key[0]}_{key[1]} has shape {counts.shape}, expected {num_experts} "
                    "counts as meta_info.json says"
                )
            tables[key] = tables.get(key, 0) + counts.astype(np.int64)
    iterations, layers = _axes(path, tables)
    load = np.stack([np.stack([tables[i, layer] for layer in layers]) for i in iterations])
    record = make_load(load, layer_ids=layers, source={"importer": "tensorrt-llm"}, where=str(path))
    return Recorded(record)


def _read_tokens(path: Path, files: dict[int, Path], num_experts: int) -> Recorded:
    streams: list[tuple[int, NDArray[np.integer], NDArray[np.int64]]] = []
    all_layers: list[int] | None = None
    repeated = 0
    for rank, file in files.items():
        tables = _tables(file)
        iterations, layers = _axes(file, tables)
        if all_layers not in (None, layers):
            raise BadFileError(f"{file} is about other layers than the files before it")
        all_layers = layers
        experts, step = [], []
        for i in iterations:
            of_layers = [tables[i, layer] for layer in layers]
            if any(one.ndim != 2 or one.shape != of_layers[0].shape for one in of_layers):
                raise BadFileError(f"{file}: iteration {i} has other tokens in some layers")
            experts.append(np.stack(of_layers, axis=1))
            step.append(np.full(len(of_layers[0]), i, np.int64))
        stream = (rank, np.concatenate(experts), np.concatenate(step))
        if any(np.array_equal(stream[1], other[1]) for other in streams):
            repeated += 1
        else:
            streams.append(stream)
    assert all_layers is not None
    warnings = [
        "TensorRT-LLM records no requests: all tokens count as one request, so a plan can only be "
        "judged in-sample (--in-sample), or by another recording",
        "it records no gate weights: the first expert of a token counts as its primary",
    ]
    if repeated:
        warnings.append(f"{counted(repeated, 'rank')} recorded the tokens of another one")
    trace = make_trace(
        experts=np.concatenate([stream[1] for stream in streams]),
        num_experts=num_experts,
        layer_ids=all_layers,
        step=np.concatenate([stream[2] for stream in streams]),
        home=np.concatenate([np.full(len(one), rank) for rank, one, _ in streams])
        if len(streams) > 1
        else None,
        where=str(path),
    )
    return Recorded(trace, warnings)


def _meta_info(path: Path) -> dict[str, Any]:
    file = path / "meta_info.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFileError(
            f"{path} holds no meta_info.json, so it is no folder of TensorRT-LLM's statistics"
        ) from None
    except (OSError, ValueError) as error:
        raise BadFileError(f"{file} is not valid JSON: {error}", "was it truncated?") from None
    count = document.get("num_experts") if isinstance(document, dict) else None
    if type(count) is not int or count < 1:
        raise BadFileError(f"{file}: num_experts is {count!r}, expected a number")
    return {"num_experts": count}


def _ranks(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Rank -> file, by rank."""
    found = {
        int(match[1]): file for file in path.iterdir() if (match := pattern.fullmatch(file.name))
    }
    return dict(sorted(found.items()))


def _tables(file: Path) -> _Tables:
    tables: _Tables = {}
    for key, array in load_safetensors(file).items():
        match = _KEY.fullmatch(key)
        if not match or array.dtype.kind not in "iu":
            raise BadFileError(
                f"{file}: {key!r} is {array.dtype}, expected counts of <iteration>_<layer>"
            )
        tables[int(match[1]), int(match[2])] = array
    return tables


def _axes(where: Path, tables: _Tables) -> tuple[list[int], list[int]]:
    """The iterations and the layers, every one of which must have every other."""
    if not tables:
        raise BadFileError(f"{where} holds no iterations")
    iterations = sorted({i for i, _ in tables})
    layers = sorted({layer for _, layer in tables})
    for i in iterations:
        for layer in layers:
            if (i, layer) not in tables:
                raise BadFileError(f"{where}: iteration {i} has no layer {layer}, others have")
    return iterations, layers

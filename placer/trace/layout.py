"""The files of a native trace: their names, the manifest and the marks of finished streams.

A native trace is a folder:

    manifest.json               what the whole trace has in common
    part-<rank>-<number>.parquet    a row per token (see `columns`)
    open-<rank>                 there while a rank writes; left behind by one that was cut off
    closed-<rank>.json          written when a rank ends in order; says how much it wrote

Other files may lie beside them: placer leaves them alone and never reads them.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from placer.errors import BadFileError, UsageError
from placer.files import read_json, write_json
from placer.trace.model import ModelDims

MANIFEST = "manifest.json"
FORMAT = "placer.trace"
CLOSED_FORMAT = "placer.trace.closed"
SCHEMA_VERSION = 1

_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")
_CLAIM = re.compile(r"open-(\d+)")
_CLOSED = re.compile(r"closed-(\d+)\.json")
_TEMPORARY = re.compile(r"\.(part-\d+-\d+\.parquet\.tmp|(manifest|closed-\d+)\.json\..+)")

_Positive = Annotated[int, Field(ge=1)]
_Natural = Annotated[int, Field(ge=0)]


class _Dims(BaseModel, strict=True):
    name: str | None = None
    hidden_size: _Positive | None = None
    expert_bytes: _Positive | None = None
    expert_flops_per_token: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Manifest(BaseModel, strict=True):
    """What all parts of a native trace have in common.

    Attributes:
        num_experts: E.
        layer_ids: real numbers of the MoE layers, increasing; repeated for each routing round.
        top_k: the most experts that a token may use in one layer.
        weights, step, home: whether the parts have these columns.
        model: dimensions of the model.
        source: where the trace came from, in the words of whoever wrote it.
    """

    num_experts: _Positive
    layer_ids: Annotated[list[_Natural], Field(min_length=1)]
    top_k: _Positive
    weights: bool
    step: bool
    home: bool
    model: _Dims = Field(default_factory=_Dims)
    source: dict[str, Any] | None = None

    def dims(self) -> ModelDims:
        return ModelDims(**self.model.model_dump())

    def layers(self) -> NDArray[np.int64]:
        """[L] int64 layer ids."""
        return np.array(self.layer_ids, np.int64)

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {"format": FORMAT, "schema_version": SCHEMA_VERSION, **self.model_dump()}

    def differences(self, other: Manifest) -> list[str]:
        """Names of the fields, `source` aside, in which two manifests differ."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [name for name in mine if name != "source" and mine[name] != theirs[name]]


def make_manifest(model: ModelDims, **fields: Any) -> Manifest:
    """A manifest from Python values; UsageError when they make no sense."""
    try:
        manifest = Manifest(model=_Dims(**asdict(model)), **fields)
    except ValidationError as error:
        raise UsageError(f"a trace cannot be written so: {_first_problem(error)}") from None
    problem = _problem(manifest)
    try:
        json.dumps(manifest.source, allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = f"source is no JSON document: {error}"
    if problem:
        raise UsageError(f"a trace cannot be written so: {problem}")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a native trace."""
    path = folder / MANIFEST
    if not path.exists():
        raise BadFileError(
            f"{folder} holds no {MANIFEST}, so it is not a native trace",
            "give the folder that placer trace or placer import wrote, or an .npz file",
        )
    document = read_json(path, FORMAT, SCHEMA_VERSION)
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise BadFileError(f"{path}: {_first_problem(error)}") from None
    problem = _problem(manifest)
    if problem:
        raise BadFileError(f"{path}: {problem}")
    return manifest


def join_manifest(folder: Path, manifest: Manifest, rank: int) -> None:
    """Write the manifest, or accept the equal one that another rank wrote first.

    The file appears under its name complete or not at all, and never replaces another.
    """
    temporary = folder / f".{MANIFEST}.{rank}.tmp"
    target = folder / MANIFEST
    try:
        temporary.write_text(json.dumps(manifest.document(), indent=1) + "\n", encoding="utf-8")
        try:
            os.link(temporary, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not target.exists():
                os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    differing = manifest.differences(read_manifest(folder))
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise UsageError(
            f"{target} describes another trace: {', '.join(differing)} {verb}",
            "give another path, or --force to replace that trace",
        )


def part_name(rank: int, number: int) -> str:
    return f"part-{rank}-{number:05d}.parquet"


def closed_name(rank: int) -> str:
    return f"closed-{rank}.json"


def claim_name(rank: int) -> str:
    return f"open-{rank}"


def claim(folder: Path, rank: int) -> None:
    """Take the stream of `rank`; two writers cannot both have it."""
    try:
        with (folder / claim_name(rank)).open("xb"):
            pass
    except FileExistsError:
        raise UsageError(
            f"another writer has opened rank {rank} of {folder}, or was cut off while it wrote",
            "give each writer its own rank; to replace the trace, --force",
        ) from None


def write_closed(folder: Path, rank: int, *, tokens: int, parts: int) -> None:
    """Say that the stream of `rank` is whole and how much it holds, and give up the claim."""
    document = {
        "format": CLOSED_FORMAT,
        "schema_version": SCHEMA_VERSION,
        "rank": rank,
        "tokens": tokens,
        "parts": parts,
    }
    write_json(folder / closed_name(rank), document)
    (folder / claim_name(rank)).unlink(missing_ok=True)


def read_closed(folder: Path, rank: int) -> tuple[int, int]:
    """Tokens and parts that `rank` wrote, by its own account."""
    path = folder / closed_name(rank)
    document = read_json(path, CLOSED_FORMAT, SCHEMA_VERSION)
    tokens, parts = document.get("tokens"), document.get("parts")
    if not (type(tokens) is int and type(parts) is int and tokens >= 0 and parts >= 0):
        raise BadFileError(f"{path} must hold the whole numbers tokens and parts")
    return tokens, parts


def part_files(folder: Path) -> dict[int, dict[int, Path]]:
    """Rank -> part number -> file, both in increasing order."""
    found = [
        (int(match[1]), int(match[2]), path)
        for path in folder.iterdir()
        if (match := _PART.fullmatch(path.name))
    ]
    parts: dict[int, dict[int, Path]] = {}
    for rank, number, path in sorted(found):
        other = parts.setdefault(rank, {}).setdefault(number, path)
        if other != path:
            raise BadFileError(f"{other} and {path.name} are both part {number} of rank {rank}")
    return parts


def closed_ranks(folder: Path) -> set[int]:
    """The ranks that ended in order."""
    return _ranks(folder, _CLOSED)


def claimed_ranks(folder: Path) -> set[int]:
    """The ranks that write now, or were cut off while they wrote."""
    return _ranks(folder, _CLAIM)


def own_files(folder: Path) -> list[Path]:
    """placer's own files in a folder, the manifest first, half-written ones included."""
    own = [
        path
        for path in sorted(folder.iterdir())
        if any(pattern.fullmatch(path.name) for pattern in (_PART, _CLAIM, _CLOSED, _TEMPORARY))
        and not path.is_dir()
    ]
    manifest = folder / MANIFEST
    return [manifest, *own] if _is_ours(manifest) else own


def clear(folder: Path) -> None:
    """Remove placer's own files, the manifest first, so that what remains is no trace."""
    for path in own_files(folder):
        path.unlink(missing_ok=True)


def _ranks(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return {int(match[1]) for match in matches if match}


def _is_ours(manifest: Path) -> bool:
    """Whether `manifest` is there and is not another program's file of that name."""
    if not manifest.exists():
        return False
    try:
        read_json(manifest, FORMAT, 1 << 30)
    except BadFileError:
        return False
    return True


def _problem(manifest: Manifest) -> str:
    ids = manifest.layer_ids
    if any(b < a for a, b in pairwise(ids)):
        return f"layer_ids are {ids}, expected increasing numbers"
    if manifest.top_k > manifest.num_experts:
        return f"top_k is {manifest.top_k}, more than the {manifest.num_experts} experts"
    return ""


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"

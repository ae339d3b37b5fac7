"""Clusters as TOML files (docs/cluster.md)."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from placer.cluster.model import Cluster, Network, RankFigures
from placer.errors import BadFileError, UsageError
from placer.files import atomic_path, nothing_at

FORMAT = "placer.cluster"
SCHEMA_VERSION = 2  # 2: network, rank_figures, pair tables, shared bus, fixed costs; 1 reads as is
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "tuple[int, ...]": "a list of integers",
    "tuple[float, ...]": "a list of numbers",
    "tuple[tuple[float, ...], ...]": "a list of lists of numbers",
    "Network": "a table",
    "tuple[RankFigures, ...]": "an array of tables",
}


def read_cluster(path: Path) -> Cluster:
    """Read a TOML file: `format`, `schema_version` and the attributes of `Cluster` as keys.

    `network` is a table, `rank_figures` an array of tables, pair tables are lists of lists.

    Raises:
        BadFileError: missing, not TOML, a key is unknown, missing or of the wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise nothing_at(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadFileError(f"{path} is not valid TOML: {error}") from None
    found = document.pop("format", None)
    if found != FORMAT:
        raise BadFileError(
            f"{path} is not a cluster file (its format says {found!r})",
            f'it must begin with format = "{FORMAT}"',
        )
    version = document.pop("schema_version", None)
    if version not in range(1, SCHEMA_VERSION + 1) or isinstance(version, bool):
        raise BadFileError(
            f"{path} has schema_version {version!r}, this placer reads 1..{SCHEMA_VERSION}"
        )
    document.pop("fit", None)  # what a calibration writes about itself, for people
    document.setdefault("name", path.stem)
    _check_keys(str(path), Cluster, document)
    try:
        if "network" in document:
            _check_keys(f"{path}: network", Network, document["network"])
            document["network"] = Network(**document["network"])
        for entry in document.get("rank_figures", ()):
            _check_keys(f"{path}: rank_figures", RankFigures, entry)
        document["rank_figures"] = tuple(
            RankFigures(**{**entry, "ranks": tuple(entry["ranks"])})
            for entry in document.get("rank_figures", ())
        )
        for name in ("pair_gbps", "pair_latency_us"):
            if name in document:
                document[name] = tuple(tuple(map(float, row)) for row in document[name])
        for name in ("curve_pairs", "curve_us"):
            document[name] = tuple(document.get(name, ()))
        return Cluster(**document)
    except UsageError as error:
        raise BadFileError(f"{path}: {error.message}", error.hint) from None


def write_cluster(
    path: Path, cluster: Cluster, *, fit: Mapping[str, Any] | None = None, force: bool = False
) -> None:
    """Write a TOML file that `read_cluster` reads back to an equal cluster.

    Args:
        path: of the file.
        cluster: what to write.
        fit: a table that says how well measurements were met; for people, not read back.
        force: replace an existing file.
    """
    lines = [f'format = "{FORMAT}"', f"schema_version = {SCHEMA_VERSION}"]
    tables: list[str] = []
    for field in fields(Cluster):
        value = getattr(cluster, field.name)
        if isinstance(value, Network):
            tables += ["", "[network]", *_pairs(value)]
        elif field.name == "rank_figures":
            for entry in value:
                tables += ["", "[[rank_figures]]", *_pairs(entry)]
        elif value is not None and value != ():
            lines.append(f"{field.name} = {_toml(value)}")
    if fit:
        tables += ["", "[fit]", *(f"{name} = {_toml(value)}" for name, value in fit.items())]
    with atomic_path(path, force=force) as temporary:
        temporary.write_text("\n".join([*lines, *tables]) + "\n", encoding="utf-8")


def _pairs(value: Any) -> list[str]:
    return [
        f"{field.name} = {_toml(getattr(value, field.name))}"
        for field in fields(value)
        if getattr(value, field.name) is not None
    ]


def _toml(value: Any) -> str:
    if isinstance(value, str | bool):
        return json.dumps(value)
    if isinstance(value, tuple):
        rows = [_toml(entry) for entry in value]
        is_table = bool(value) and isinstance(value[0], tuple)
        return "[\n  " + ",\n  ".join(rows) + ",\n]" if is_table else f"[{', '.join(rows)}]"
    return repr(value)


def _check_keys(where: str, kind: type[Any], document: Any) -> None:
    if not isinstance(document, dict):
        raise BadFileError(f"{where} is {document!r}, expected a table")
    known = {field.name: str(field.type) for field in fields(kind)}
    for key, value in document.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise BadFileError(f"{where}: unknown key {key!r}", hint)
        wanted = _KINDS.get(known[key].removesuffix(" | None"), "a string")
        if not _is(value, wanted):
            raise BadFileError(f"{where}: {key} is {value!r}, expected {wanted}")
    required = [
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [key for key in required if key not in document]
    if missing:
        raise BadFileError(f"{where}: {', '.join(missing)} missing")


def _is(value: Any, wanted: str) -> bool:
    if wanted == "an integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted == "a number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted == "a string":
        return isinstance(value, str)
    if wanted == "a table":
        return isinstance(value, dict)
    element = {
        "a list of integers": "an integer",
        "a list of lists of numbers": "a list of numbers",
        "a list of numbers": "a number",
        "an array of tables": "a table",
    }[wanted]
    return isinstance(value, list) and all(_is(entry, element) for entry in value)

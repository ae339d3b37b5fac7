"""The folder of a sweep: what was asked in `sweep.json`, a file per finished cell in `cells/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from placer.errors import BadFileError, UsageError
from placer.files import read_json, write_json
from placer.planning import Settings
from placer.sweep import cells
from placer.sweep.grid import Cell
from placer.trace.source import TraceSource

FORMAT = "placer.sweep"
SCHEMA_VERSION = 1

_SHAPE = ("num_ranks", "num_nodes", "slots_per_rank", "dispatch", "cluster")


class Store:
    """Finished cells of a sweep.

    Args:
        folder: made if it is not there.
        sources, settings: what all cells share.

    Raises:
        UsageError: the folder holds a sweep of other traces or settings, or other files.
        BadFileError: its `sweep.json` is damaged.
    """

    def __init__(self, folder: Path, sources: Sequence[TraceSource], settings: Settings) -> None:
        self.folder = folder
        asked = {
            "inputs": [
                {
                    "name": source.path.name if source.path else None,
                    "fingerprint": source.fingerprint(),
                    "tokens": source.num_tokens,
                }
                for source in sources
            ],
            "settings": {
                name: value for name, value in asdict(settings).items() if name not in _SHAPE
            },
        }
        self._asked = json.loads(json.dumps(asked))  # as it is read back: tuples are lists
        self._open()

    @property
    def cells(self) -> Path:
        return self.folder / "cells"

    def _open(self) -> None:
        path = self.folder / "sweep.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file, expected a folder for the sweep")
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UsageError(
                    f"{self.folder} holds other files and no sweep", "give another folder"
                )
            if not self.folder.parent.is_dir():
                raise UsageError(
                    f"the folder {self.folder.parent} does not exist",
                    f"mkdir -p {self.folder.parent}",
                )
            self.cells.mkdir(parents=True)
            write_json(path, {"format": FORMAT, "schema_version": SCHEMA_VERSION, **self._asked})
            return
        found = read_json(path, FORMAT, SCHEMA_VERSION)
        for name, what in (("inputs", "traces"), ("settings", "settings")):
            if found.get(name) != self._asked[name]:
                raise UsageError(
                    f"{self.folder} holds a sweep of other {what}{self._difference(found, name)}",
                    "give another folder; the grid may grow, the rest stays",
                )
        self.cells.mkdir(exist_ok=True)

    def _difference(self, found: dict[str, Any], name: str) -> str:
        theirs, ours = found.get(name), self._asked[name]
        if not isinstance(theirs, dict) or not isinstance(ours, dict):
            return ""
        keys = [key for key in ours if theirs.get(key) != ours[key]]
        return f": {keys[0]} was {theirs.get(keys[0])}, not {ours[keys[0]]}" if keys else ""

    def put(self, cell: Cell, document: dict[str, Any]) -> None:
        """Keep a finished cell."""
        write_json(self.cells / f"{cell.name}.json", document, force=True)

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell; None where there is none, or its file is damaged."""
        path = self.cells / f"{cell.name}.json"
        try:
            document = read_json(path, cells.FORMAT, cells.SCHEMA_VERSION)
        except BadFileError:
            return None
        return document if document.get("config") == cell.config else None

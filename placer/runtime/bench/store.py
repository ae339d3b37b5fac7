"""Repeats that are done, a file each, so that a bench that was cut off goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from placer.errors import BadFileError, UsageError
from placer.files import read_json, write_json

FORMAT = "placer.bench-repeat"
SCHEMA_VERSION = 1


class Store:
    """The folder of a bench.

    Args:
        folder: is made when it is not there; None to keep nothing beyond this run.
        settings: what is measured; repeats of other settings are refused.

    Raises:
        UsageError: the folder holds repeats of another bench.
        BadFileError: a repeat's file is damaged.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self._repeats: dict[int, dict[str, Any]] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be a folder: {error.strerror}") from None
        for path in sorted(folder.glob("repeat-*.json")):
            document = read_json(path, FORMAT, SCHEMA_VERSION)
            lacking = [key for key in ("settings", "repeat", "arms") if key not in document]
            if lacking:
                raise BadFileError(f"{path} has no {lacking[0]}", "remove it to measure again")
            self._refuse_others(path, document["settings"])
            self._repeats[int(document["repeat"])] = document["arms"]

    def missing(self, count: int) -> list[int]:
        """Which of `count` repeats are still to be done."""
        return [i for i in range(count) if i not in self._repeats]

    def keep(self, repeat: int, arms: dict[str, Any]) -> None:
        """Keep a repeat: arm -> what was measured."""
        self._repeats[repeat] = arms
        if self._folder is None:
            return
        document = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "settings": self._settings,
            "repeat": repeat,
            "arms": arms,
        }
        write_json(self._folder / f"repeat-{repeat:03}.json", document)

    def repeats(self, count: int) -> list[dict[str, Any]]:
        """The first `count` repeats, which must all be there: arm -> what was measured."""
        return [self._repeats[i] for i in range(count)]

    def _refuse_others(self, path: Path, found: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if found.get(name) != value:
                raise UsageError(
                    f"{path} was measured with other {name}: {found.get(name)}, now {value}",
                    "give another -o, or remove that folder",
                )

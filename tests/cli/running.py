"""Running commands in this process, and what must hold whenever one fails."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from placer.cli.app import app


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    exit_code: int
    stdout: str
    stderr: str

    def document(self) -> Any:
        """Standard output as one JSON document, with nothing before or behind it."""
        return json.loads(self.stdout)


def run(*arguments: object) -> Outcome:
    """Run `placer` with these arguments; exceptions that it does not handle come through."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def succeeds(*arguments: object) -> Outcome:
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


def fails(exit_code: int, folder: Path, *arguments: object) -> str:
    """Run a command that must fail; returns its error line and hint.

    It prints nothing on stdout, one error line and one line what to do, and leaves `folder` as it
    was.
    """
    before = listing(folder)
    outcome = run(*arguments)
    assert outcome.exit_code == exit_code, (outcome.exit_code, outcome.stderr)
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], outcome.stderr
    assert listing(folder) == before
    return outcome.stderr


def usage_error(folder: Path, *arguments: object) -> str:
    """Run a command line that the parser must refuse."""
    before = listing(folder)
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert listing(folder) == before
    return outcome.stderr

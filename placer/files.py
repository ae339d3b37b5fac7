"""Writing files so that nothing is half-written and nothing is overwritten silently."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from placer.errors import BadFileError, PlacerError, UsageError


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise UsageError when `path` exists and the user did not say --force."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", "give another path, or --force to replace it")


def check_output_file(path: Path, force: bool) -> None:
    """Raise UsageError when no file can be put at `path`; to be called before the work."""
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder, expected the name of a file", f"for example {path / 'file'}"
        )
    refuse_overwrite(path, force)
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist", f"mkdir -p {path.parent}")


def check_output_folder(path: Path, force: bool) -> None:
    """Raise UsageError when no folder of our own can be put at `path`."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected the name of a folder", "give another path")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(f"{path} exists already", "give another path, or --force to replace it")


@contextlib.contextmanager
def atomic_path(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block succeeds.

    When the block raises, the temporary file is removed and `path` is as it was.

    Raises:
        UsageError: `path` exists and may not be replaced, or its folder does not exist.
        PlacerError: the file system refuses: no space, no permission.
    """
    check_output_file(path, force)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name[:100]}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise PlacerError(
            f"{path} cannot be written: {error.strerror or error}",
            "is there room, and may you write there? give another path if not",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any, *, force: bool = False) -> None:
    """Write `document` as indented JSON, atomically."""
    with atomic_path(path, force=force) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def nothing_at(path: Path, hint: str = "") -> BadFileError:
    """The error that nothing lies at `path`; it names what may have been meant, or gives `hint`."""
    if not path.parent.is_dir():
        return BadFileError(f"{path} does not exist", f"there is no folder {path.parent}")
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.8)
    if close:
        hint = f"did you mean {path.with_name(close[0])}?"
    return BadFileError(f"{path} does not exist", hint or "is the name spelled right?")


def load_json(path: Path, what: str, hint: str = "") -> Any:
    """Any JSON document.

    Args:
        path: the file.
        what: the expected kind of file, in messages.
        hint: where such a file comes from.

    Raises:
        BadFileError: missing, a folder, unreadable, not JSON, or with NaN or infinity in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise nothing_at(path, hint) from None
    except IsADirectoryError:
        raise BadFileError(f"{path} is a folder, not a {what} file", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} cannot be read: {error}", hint) from None
    except json.JSONDecodeError as error:
        raise BadFileError(
            f"{path} is not valid JSON: {error}",
            "was the file truncated? make it anew",
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is not valid JSON: {error}", hint) from None


def read_json(
    path: Path, expected_format: str, newest_version: int, hint: str = ""
) -> dict[str, Any]:
    """Read a JSON object that names its format and version.

    Args:
        path: the file.
        expected_format: what its key `format` must say, e.g. "placer.plan".
        newest_version: the newest `schema_version` that this program understands.
        hint: where such a file comes from.

    Raises:
        BadFileError: missing, not JSON, of another format, or of a newer version.
    """
    document = load_json(path, expected_format, hint)
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != expected_format:
        raise BadFileError(
            f"{path} is not a {expected_format} file (its format says {found!r})", hint
        )
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BadFileError(f"{path} has schema_version {version!r}, expected 1..{newest_version}")
    if version > newest_version:
        raise BadFileError(
            f"{path} has schema_version {version}, this placer reads up to {newest_version}",
            "install a newer moe-placer",
        )
    return document


def _refuse_constant(name: str) -> None:
    """JSON knows no NaN and no infinity, whatever Python writes."""
    raise ValueError(f"it holds {name}")

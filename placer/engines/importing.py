"""What an engine wrote: a plan, or a record that becomes a trace or a load record of placer's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from placer.engines.records import RECORD_FORMATS, Hints
from placer.engines.registry import ENGINES, PlanFormat, recognised_plan
from placer.errors import UsageError
from placer.files import check_output_file
from placer.trace.importing import new_trace_folder, write_trace
from placer.trace.load import LoadRecord, write_load
from placer.trace.model import Trace


@dataclass(frozen=True, eq=False)
class ImportedRecords:
    """What an import made.

    Attributes:
        path: the trace's folder, or the load record's file.
        content: what is in it.
        warnings: what a user should know, a sentence each.
    """

    path: Path
    content: Trace | LoadRecord
    warnings: list[str]


def plan_format_of(name: str, path: Path) -> PlanFormat | None:
    """The kind of plan to read from `path`; None when it is to be read as a record.

    Some engines' names stand for both; then the file decides.
    """
    if name in ENGINES and name not in RECORD_FORMATS:
        return recognised_plan(name, path) or next(ENGINES[name].plan_formats())
    return recognised_plan(name, path)


def import_records(
    path: Path, output: Path, *, record_format: str, hints: Hints | None = None, force: bool = False
) -> ImportedRecords:
    """Read what another program recorded and write it as placer's own.

    Tokens become a native trace, a folder; mere load becomes a load record, a file.

    Args:
        path: what the other program wrote.
        output: the folder or file to make.
        record_format: a name of RECORD_FORMATS.
        hints: what `path` does not say.
        force: replace what is at `output`.

    Raises:
        BadFileError: missing, damaged, or not of this format; nothing is written.
        UsageError: an unknown format, a bad output, or a hint that is missing.
    """
    if record_format not in RECORD_FORMATS:
        raise UsageError(
            f"there is no format {record_format!r}",
            f"formats: {', '.join({**RECORD_FORMATS, **ENGINES})}",
        )
    _check_output(output, force)
    recorded = RECORD_FORMATS[record_format].read(path, hints or Hints())
    if isinstance(recorded.content, LoadRecord):
        write_load(recorded.content, output, force=force)
    else:
        with new_trace_folder(output, force=force) as folder:
            source: dict[str, object] = {"imported_from": path.name, "importer": record_format}
            write_trace(recorded.content, folder, source=source)
    return ImportedRecords(output, recorded.content, recorded.warnings)


def _check_output(output: Path, force: bool) -> None:
    """Refuse what neither a trace nor a load record may be put at, before the work begins."""
    if output.is_dir():
        if any(output.iterdir()) and not force:
            raise UsageError(
                f"{output} exists already and is not empty",
                "give another path, or --force to replace the trace in it",
            )
        return
    check_output_file(output, force)

"""Where output goes: documents and tables to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

FILE_WIDTH = 160  # of tables that go to a file or a pipe
NOT_KEPT = "each time (NUMBA_CACHE_DIR must be writable)"


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, width=None if stream.isatty() else FILE_WIDTH)


def stdout_console() -> Console:
    """For what the user asked to see."""
    return _console(sys.stdout)


def stderr_console() -> Console:
    """For progress, warnings and errors."""
    return _console(sys.stderr)


def show(json_output: bool, document: Any, render: Callable[[], list[RenderableType]]) -> None:
    """One JSON document, or what `render` makes of it for people."""
    if json_output:
        sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        return
    console = stdout_console()
    for item in render():
        console.print(item)


def show_error(message: str, hint: str) -> None:
    """One line what is wrong, one line what to do."""
    console = stderr_console()
    console.print("[bold red]error:[/] ", end="")
    console.print(message, markup=False, soft_wrap=True)
    if hint:
        console.print("[bold]hint:[/] ", end="")
        console.print(hint, markup=False, soft_wrap=True)


def show_warnings(warnings: list[str]) -> None:
    """A line each."""
    for warning in warnings:
        stderr_console().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


@contextlib.contextmanager
def progress_status() -> Iterator[Callable[[str], None]]:
    """On a terminal say what is being done, and the time since the start; nothing elsewhere.

    Kernels may be compiled meanwhile, which is said too.
    """
    from solvers.clock import COMPILE_CLOCK

    console = stderr_console()
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        doing, step = "starting", progress.add_task("starting")

        def say(text: str) -> None:
            nonlocal doing
            doing = text
            progress.update(step, description=escape(text))

        def compiling(begins: bool) -> None:
            often = "once per machine" if COMPILE_CLOCK.kept else NOT_KEPT
            text = f"compiling, {often}: {doing}" if begins else doing
            progress.update(step, description=escape(text), refresh=begins)

        with COMPILE_CLOCK.watched(compiling):
            yield say

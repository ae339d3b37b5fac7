"""Progress on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from placer.report import console
from solvers.clock import COMPILE_CLOCK


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_says_what_is_done_from_the_start_and_only_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for kind in (Terminal, io.StringIO):
        stream = kind()
        monkeypatch.setattr("sys.stderr", stream)
        with console.progress_status() as progress:
            progress("counting [all] tokens")
        shown[kind] = stream.getvalue()
    assert "counting [all] tokens" in shown[Terminal]
    assert "0:00:00" in shown[Terminal]
    assert shown[io.StringIO] == ""


@pytest.mark.parametrize(("kept", "often"), [(True, "once per machine"), (False, "each time")])
def test_progress_says_when_kernels_are_compiled(monkeypatch, kept, often):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr(COMPILE_CLOCK, "kept", kept)
    with console.progress_status() as progress:
        progress("solving")
        COMPILE_CLOCK.begin()
        progress("solving on")
        COMPILE_CLOCK.end()
    assert f"compiling, {often}" in sys.stderr.getvalue()

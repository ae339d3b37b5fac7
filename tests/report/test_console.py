"""Progress on a terminal."""

from __future__ import annotations

import io

from placer.report import console


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

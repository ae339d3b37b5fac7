"""Errors that a user sees: one line that says what is wrong, and a hint that says how to mend it.

Every class carries the exit code that the command line ends with:
0 done, 1 failed, 2 usage, 3 infeasible, 4 time limit without a plan, 5 bad file.
"""

from __future__ import annotations


class PlacerError(Exception):
    """Base of all errors that placer raises on purpose.

    Args:
        message: what was found, what was expected, and where.
        hint: what to do about it; where nothing is said, what usually helps.
    """

    exit_code = 1
    usual_hint = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class UsageError(PlacerError):
    """The request makes no sense, whatever the files hold."""

    exit_code = 2
    usual_hint = "--help says what may be asked for"


class InfeasibleError(PlacerError):
    """No plan can satisfy the request."""

    exit_code = 3
    usual_hint = "more slots per rank, fewer pins, more moves or a higher cap on imbalance"


class TimeLimitError(PlacerError):
    """The time limit passed before there was a plan."""

    exit_code = 4
    usual_hint = "give it a longer time limit"


class BadFileError(PlacerError):
    """A file is missing, damaged, of another kind, or says something impossible."""

    exit_code = 5
    usual_hint = "is it the file that you mean, and whole? if so, make it anew"


class MissingExtraError(PlacerError):
    """An optional dependency is not installed.

    Args:
        package: the import that failed.
        extra: the extra of `moe-placer` that brings it.
    """

    exit_code = 1

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package}, which is not installed",
            f"pip install 'moe-placer[{extra}]'",
        )

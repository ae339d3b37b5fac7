"""Words that change with a number."""

from __future__ import annotations


def counted(number: int, what: str, many: str = "") -> str:
    """1 request, 1,234 requests.

    Args:
        number: how many.
        what: one of them.
        many: several of them; what + "s" unless it is said.
    """
    return f"{number:,} {what if number == 1 else many or what + 's'}"

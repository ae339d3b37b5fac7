"""Numbers and names as people read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def counted(number: int, what: str, many: str = "") -> str:
    """1 request, 1,234 requests.

    Args:
        number: how many.
        what: one of them.
        many: several of them; what + "s" unless it is said.
    """
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def sized(num_bytes: int) -> str:
    """1.23 GB, 73.73 MB, 512 B."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"


def among(name: str, known: Iterable[str], what: str = "there are") -> str:
    """A hint for somebody who asked for an unknown name: the closest one, if any, and all."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}{what} {', '.join(names)}"

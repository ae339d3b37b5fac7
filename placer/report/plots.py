"""Figures as SVG text that is readable on light and on dark pages.

Lines, axes and words take the page's own colour (`currentColor`); data take colours that keep
their distance for colour-blind eyes (Okabe and Ito, 2008). The same data give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c", "#b8a800")
_INK = "#010203"  # stands for the page's colour until the figure is text
_STANDALONE = (
    "<style>svg { color: #222; } "
    "@media (prefers-color-scheme: dark) { svg { color: #ddd; } }</style>"
)


@contextmanager
def style() -> Iterator[Any]:
    """matplotlib's pyplot-free `Figure` class, with the look that all figures share."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.titlesize": 10,
        "axes.prop_cycle": cycler(color=list(PALETTE)),
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(look):
        yield Figure


def to_svg(figure: Any, name: str, *, standalone: bool = False) -> str:
    """The figure as an SVG element.

    Args:
        figure: made inside `style()`, and turned into text inside it.
        name: different for every figure of a page; ids in the SVG are made of it.
        standalone: for a file of its own, which has no page to take its colour from.
    """
    import matplotlib

    buffer = io.StringIO()
    salt = hashlib.sha256(name.encode()).hexdigest()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    for reference in ('id="', "url(#", 'href="#'):  # several figures share a page
        text = text.replace(reference, f"{reference}{name}-")
    if standalone:
        head = text.index(">") + 1
        text = text[:head] + _STANDALONE + text[head:]
    return text

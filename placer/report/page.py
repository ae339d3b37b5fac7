"""A self-contained HTML page: its look, and the few elements that pages are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --dim: #5c6570; --line: #d7dbe0;
  --page: #ffffff; --card: #f5f6f8; --good: #0a7a4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #a0a8b2; --line: #3a4048;
  --page: #15181c; --card: #1f2329; --good: #4fc38a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
.dim, figcaption, caption { color: var(--dim); font-size: .87rem; }
.warning { border-left: 3px solid var(--bad); padding-left: .7rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 600; }
.tile span { color: var(--dim); font-size: .85rem; display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; caption-side: bottom; padding-top: .4rem; }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--dim); white-space: nowrap; }
figure { margin: .8rem 0 1.6rem; }
figure svg { max-width: 100%; height: auto; color: var(--ink); }
details { margin: .6rem 0; } summary { cursor: pointer; }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto; }
@media print { h2 { break-after: avoid; } figure, .tile, tr { break-inside: avoid; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document; `body` holds HTML, `title` text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """Text as a paragraph."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def tile(value: str, what: str, kind: str = "") -> str:
    """A figure in large type, and what it is."""
    return (
        f'<div class="tile"><b{_class(kind)}>{escape(value)}</b><span>{escape(what)}</span></div>'
    )


def tiles(items: Sequence[str]) -> str:
    return f'<div class="tiles">{"".join(items)}</div>'


def table(
    headers: Sequence[str], rows: Sequence[Sequence[tuple[str, str] | str]], caption: str = ""
) -> str:
    """A table of text; a cell is its text, or (text, class)."""

    def cell(entry: tuple[str, str] | str) -> str:
        text, kind = (entry, "") if isinstance(entry, str) else entry
        return f"<td{_class(kind)}>{escape(text)}</td>"

    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    note = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{note}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    """A drawing with what it shows, which is also what a screen reader says of it."""
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>{named}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, body: str) -> str:
    """Something long that opens on a click; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""

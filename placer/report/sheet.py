"""`Sheet`: a table that no terminal, however narrow, robs of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

GAP = 2  # blanks between columns
LONGEST_WORD = 26  # a longer one, such as a path, may be split


@dataclass(frozen=True)
class _Column:
    header: str
    words: bool
    justify: Literal["left", "right"]
    style: str
    joined: bool

    def text(self, cell: str) -> Text:
        return Text.from_markup(cell, overflow="fold", justify=self.justify)


class Sheet:
    """Columns and rows, shown side by side where there is room.

    Where there is not, headers and columns of words fold. Where that is not enough, the columns
    stand in blocks below one another, each beginning with the key columns again. Figures are
    never folded, cut or left out.

    Args:
        title, caption: above and below, in rich's markup.
        header: whether headers are shown.
        keys: how many of the first columns say what a row is of.
    """

    def __init__(
        self, title: str = "", caption: str = "", *, header: bool = True, keys: int = 1
    ) -> None:
        self.title = title
        self.caption = caption
        self.header = header
        self.keys = keys
        self.columns: list[_Column] = []
        self.rows: list[tuple[tuple[str, ...], str]] = []

    def add_column(
        self,
        header: str = "",
        *,
        words: bool = False,
        justify: Literal["left", "right"] = "left",
        style: str = "",
        joined: bool = False,
    ) -> None:
        """One more column; key columns are always of words.

        Args:
            header: in rich's markup.
            words: its cells are text that may fold between words.
            justify, style: as rich knows them.
            joined: it stays beside the column before it.
        """
        self.columns.append(
            _Column(header, words or len(self.columns) < self.keys, justify, style, joined)
        )

    def add_row(self, *cells: str, style: str = "") -> None:
        """One more row, in rich's markup; cells that are left out are empty."""
        self.rows.append((cells + ("",) * (len(self.columns) - len(cells)), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text.from_markup(self.title, style="italic")
        for number, block in enumerate(self._blocks(options.max_width)):
            if number:
                yield ""
            yield self._table(block, options.max_width)
        if self.caption:
            yield Text.from_markup(self.caption, style="dim")

    def _blocks(self, width: int) -> list[list[int]]:
        """Numbers of the columns of each block."""
        least = [self._widths(number)[0] for number in range(len(self.columns))]
        if sum(least) + GAP * (len(least) - 1) <= width:
            return [list(range(len(least)))]
        groups: list[list[int]] = []
        for number in range(self.keys, len(least)):
            if self.columns[number].joined and groups:
                groups[-1].append(number)
            else:
                groups.append([number])
        keys = list(range(self.keys))
        blocks = [list(keys)]
        for group in groups:
            wider = [*blocks[-1], *group]
            if blocks[-1] != keys and sum(least[i] + GAP for i in wider) - GAP > width:
                blocks.append(list(keys))
            blocks[-1] += group
        return blocks

    def _widths(self, number: int) -> tuple[int, int]:
        """Of a column: the least that keeps its figures whole, and what nothing folds in."""
        column = self.columns[number]
        cells = [column.text(cells[number]).plain for cells, _ in self.rows]
        header = column.text(column.header).plain if self.header else ""
        least = max([_longest_word(header), *(_longest_word(c) for c in cells if column.words)])
        natural = max(cell_len(text) for text in (header, *cells))
        if not column.words:
            least = max([least, *(cell_len(cell) for cell in cells)])
        return least, natural

    def _table(self, block: Sequence[int], width: int) -> Table:
        table = Table(
            box=None,
            pad_edge=False,
            show_header=self.header,
            header_style="bold",
            padding=(0, GAP, 0, 0),
        )
        spare = width - GAP * (len(block) - 1) - sum(self._widths(number)[0] for number in block)
        for number in block:
            column, (least, natural) = self.columns[number], self._widths(number)
            more = max(0, min(spare, natural - least))
            spare -= more
            table.add_column(
                column.text(column.header),
                width=least + more,
                justify=column.justify,
                style=column.style,
                overflow="fold",
            )
        for cells, style in self.rows:
            table.add_row(*(self.columns[i].text(cells[i]) for i in block), style=style)
        return table


def _longest_word(text: str) -> int:
    return min(LONGEST_WORD, max((cell_len(word) for word in text.split()), default=0))

"""A sheet shows every figure whole, however narrow the terminal is."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from placer.report.sheet import Sheet


def shown(sheet: Sheet, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(sheet)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def sheet_of(names, columns, joined=()):
    """Rows of names and figures; `columns` maps a header to its cells."""
    sheet = Sheet()
    sheet.add_column("name")
    for header in columns:
        sheet.add_column(header, joined=header in joined)
    for number, name in enumerate(names):
        sheet.add_row(name, *(cells[number] for cells in columns.values()))
    return sheet


@given(
    width=st.integers(40, 100),
    rows=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 22), min_size=1, max_size=12),
)
def test_every_figure_stands_whole_on_a_line_beside_its_name(width, rows, sizes):
    names = [f"solver-{row}" for row in range(rows)]
    columns = {
        f"figure {number}": [f"{row}{'.' * size}{number}" for row in range(rows)]
        for number, size in enumerate(sizes)
    }
    lines = shown(sheet_of(names, columns), width)
    assert max(map(len, lines)) <= width
    for cells in columns.values():
        for name, cell in zip(names, cells, strict=True):
            assert any(line.startswith(name) and cell in line.split() for line in lines)


def test_where_there_is_room_all_stands_side_by_side():
    columns = {"messages sent": ["1.234 [1.1, 1.3]"], "imbalance": ["1.05"]}
    assert shown(sheet_of(["eplb"], columns), 80) == [
        "name  messages sent     imbalance",
        "eplb  1.234 [1.1, 1.3]  1.05",
    ]


def test_headers_and_words_fold_before_columns_move_below():
    columns = {"messages sent": ["1.234"], "imbalance": ["1.05"]}
    assert shown(sheet_of(["most of it"], columns), 28) == [
        "         messages",
        "name     sent      imbalance",
        "most of  1.234     1.05",
        "it",
    ]


def test_joined_columns_stay_together_and_keys_are_repeated():
    columns = {"one": ["1" * 10], "two": ["2" * 10], "change": ["3" * 10]}
    lines = shown(sheet_of(["a"], columns, joined=("change",)), 32)
    assert lines == [
        "name  one",
        "a     1111111111",
        "",
        "name  two         change",
        "a     2222222222  3333333333",
    ]


def test_titles_and_captions_use_the_whole_width():
    sheet = Sheet("a title that is longer than the table", "a caption, too")
    sheet.add_column("n")
    sheet.add_row("1")
    assert shown(sheet, 80) == ["a title that is longer than the table", "n", "1", "a caption, too"]


def test_markup_is_no_part_of_a_width():
    sheet = Sheet(header=False)
    sheet.add_column()
    sheet.add_column()
    sheet.add_row("[bold]a[/]", r"1.0 [dim]\[0.9, 1.1][/]")
    assert shown(sheet, 17) == ["a  1.0 [0.9, 1.1]"]

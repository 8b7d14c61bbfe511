"""The comparison as a table in the terminal, in as many parts as its width asks for.

Comparison -> rows, columns -> parts that fit the console side by side with the models' names
"""

from collections.abc import Sequence

from rich.box import HORIZONTALS
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.findings import verdict
from pipeline.report.model import Comparison
from pipeline.report.rows import (
    ARROWS,
    Column,
    Row,
    best_rows,
    format_cells,
    rows_of,
    table_columns,
)
from pipeline.report.text import show_running

BEST = "*"
_GAP = 2  # blanks between two columns: one of padding, one of the box


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table, teachers first, the best student of a column in bold with a star."""
    for table in build_tables(comparison, console.width):
        console.print(table)
        console.print()
    console.print(Text(f"{BEST} best student, ↓ lower is better, ↑ higher is better", style="dim"))
    console.print(Text(verdict(comparison)))
    for note in comparison.notes:
        console.print(Text(f"note: {note}"))


def build_tables(comparison: Comparison, width: int) -> list[Table]:
    """The comparison table in parts of at most `width` cells, each with all the models.

    Text in it is never read as rich's markup.
    """
    rows = rows_of(comparison)
    names = max((cell_len(row.label) for row in rows), default=0)
    names = min(names, max(width // 3, 1))
    parts: list[list[Column]] = []
    room = 0
    for column in table_columns(comparison):
        wanted = _GAP + _column_width(rows, column)
        if not parts or wanted > room:
            parts.append([])
            room = width - names
        parts[-1].append(column)
        room -= wanted
    return [_build_part(rows, columns, names) for columns in parts]


def _build_part(rows: Sequence[Row], columns: Sequence[Column], names: int) -> Table:
    table = Table(box=HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", width=names, overflow="fold")
    cells: list[list[Text]] = []
    for column in columns:
        table.add_column(
            Text("\n".join(_heading_lines(column))),
            justify="right",
            vertical="bottom",
            no_wrap=True,
            min_width=_column_width(rows, column),
        )
        best = best_rows(rows, column)
        texts = format_cells(rows, column)
        cells.append([_cell(text, i in best) for i, text in enumerate(texts)])
    for i, row in enumerate(rows):
        style = "italic" if row.role == "teacher" else ""
        last_teacher = row.role == "teacher" and i + 1 < len(rows) and rows[i + 1].role != "teacher"
        cells_of_row = [texts[i] for texts in cells]
        table.add_row(
            Text(show_running(row.label)), *cells_of_row, style=style, end_section=last_teacher
        )
    return table


def _heading_lines(column: Column) -> list[str]:
    """The title's words under one another, then the arrow and the unit."""
    *first, last = show_running(column.title).split(" ")
    under = f"{ARROWS[column.direction]} {show_running(column.unit)}".strip()
    return [*([" ".join(first)] if first else []), last, under]


def _column_width(rows: Sequence[Row], column: Column) -> int:
    longest = max(cell_len(text) for text in format_cells(rows, column)) + 1  # the star
    return max(longest, *(cell_len(line) for line in _heading_lines(column)))


def _cell(text: str, is_best: bool) -> Text:
    """A trailing blank stands where the star would, so that digits stay aligned."""
    return Text(f"{text}{BEST}", style="bold") if is_best else Text(f"{text} ")

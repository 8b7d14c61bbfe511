"""The comparison as a table in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.findings import verdict
from pipeline.report.model import Comparison
from pipeline.report.rows import best_rows, format_cells, rows_of, table_columns

BEST = "*"


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table, teachers first, the best student of a column in bold with a star."""
    console.print(build_table(comparison))
    console.print(Text(verdict(comparison)))
    for note in comparison.notes:
        console.print(Text(f"note: {note}"))


def build_table(comparison: Comparison) -> Table:
    """The comparison table as rich shows it; text in it is never read as rich's markup."""
    rows = rows_of(comparison)
    table = Table(caption=f"{BEST} best student · ↓ lower is better · ↑ higher is better")
    table.add_column("")
    columns: list[list[Text]] = []
    for column in table_columns(comparison):
        unit = f"\n{column.unit}" if column.unit else ""
        table.add_column(Text(column.heading + unit), justify="right")
        best = best_rows(rows, column)
        cells = format_cells(rows, column)
        columns.append([_cell(text, i in best) for i, text in enumerate(cells)])
    for i, row in enumerate(rows):
        style = "italic" if row.role == "teacher" else ""
        last_teacher = row.role == "teacher" and i + 1 < len(rows) and rows[i + 1].role != "teacher"
        cells_of_row = [cells[i] for cells in columns]
        table.add_row(Text(row.label), *cells_of_row, style=style, end_section=last_teacher)
    return table


def _cell(text: str, is_best: bool) -> Text:
    """A trailing blank stands where the star would, so that digits stay aligned."""
    return Text(f"{text}{BEST}", style="bold") if is_best else Text(f"{text} ")

"""Tables of runs: the columns of figures, for terminal, HTML page and CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from charlm.files import write_atomically


class Column(NamedTuple):
    """A figure of results.json as tables show it."""

    figure: str
    head: str
    digits: int

    def format(self, value: float | None) -> str:
        return "-" if value is None else f"{value:,.{self.digits}f}"


LOSS = Column("val/loss", "val loss", 4)
COLUMNS = (
    LOSS,
    Column("val/bits_per_char", "bits/char", 4),
    Column("val/perplexity", "perplexity", 3),
    Column("train/seconds", "seconds", 1),
    Column("train/tokens", "tokens", 0),
)
SPARE = ("perplexity", "tokens", "seconds", "bits/char")  # columns that a narrow terminal drops, in this order
WIDEST, NARROWEST = 28, 20  # characters of a setting in one line
LEFT = {"vs best"}  # heads of columns that are aligned left


class Line(NamedTuple):
    """A line of a table: the values of the settings, the cells of the other columns by head, the style."""

    settings: Sequence[str]
    cells: dict[str, str]
    style: str = ""


def terminal_table(
    title: str, settings: Sequence[str], lines: Sequence[Line], console: Console, without: Sequence[str] = ()
) -> Table:
    """Return a table without the SPARE columns that do not fit on the console.

    Settings that do not fit even then share one column, in several lines where they must.

    Args:
        settings: heads of the first columns.
        without: heads of columns to leave out.
    """
    there = [head for head in (lines[0].cells if lines else ()) if head not in without]
    for number in range(len(SPARE) + 1):
        heads = [head for head in there if head not in SPARE[:number]]
        table = table_of(title, settings, lines, heads)
        if fits(table, console):
            return table
    pairs = [", ".join(f"{k}={v}" for k, v in zip(settings, line.settings, strict=True)) for line in lines]
    grouped = [Line([pair], line.cells, line.style) for pair, line in zip(pairs, lines, strict=True)]
    for width in range(max(map(len, pairs)), NARROWEST, -1):
        table = table_of(title, ["settings"], grouped, heads, width)
        if fits(table, console):
            break
    return table


def fits(table: Table, console: Console) -> bool:
    return console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width


def table_of(
    title: str, settings: Sequence[str], lines: Sequence[Line], heads: Sequence[str], widest: int = WIDEST
) -> Table:
    """Return a table.

    Args:
        heads: of the columns after the settings.
        widest: characters of a setting in one line.
    """
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, title=title)
    table.title_justify, table.title_style = "left", "bold"
    for i, setting in enumerate(settings):
        width = min(widest, max((len(line.settings[i]) for line in lines), default=0))
        justify: JustifyMethod = "right" if widest == WIDEST else "left"
        table.add_column(Text(setting), justify=justify, overflow="fold", min_width=width, max_width=widest)
    for head in heads:
        justify = "left" if head in LEFT else "right"
        width = max(len(head), *(len(line.cells[head]) for line in lines))
        table.add_column(head, justify=justify, min_width=width, no_wrap=True)
    for line in lines:
        # Text, because callbacks=[default] is no markup.
        table.add_row(*map(Text, line.settings), *(line.cells[head] for head in heads), style=line.style)
    return table


def runs_table(rows: Sequence[dict[str, Any]], settings: Sequence[str], title: str, console: Console) -> Table:
    """Return a table with a line for each run: its settings, its figures and how it ended."""
    lines = []
    for row in rows:
        loss = row.get(LOSS.figure)
        cells = {column.head: column.format(row.get(column.figure) if loss is not None else None) for column in COLUMNS}
        if loss is not None and "val/loss_se" in row:  # a pruned run has only the loss of its last validation
            cells[LOSS.head] = plus_minus(row, "val", "loss", LOSS.digits)
        status = outcome(row["status"])
        style = {"finished": "", "pruned": "dim"}.get(status, "bold red")
        lines.append(Line([short(row[setting]) for setting in settings], cells | {"status": status}, style))
    return terminal_table(title, [setting.rpartition(".")[2] for setting in settings], lines, console)


def outcome(status: str) -> str:
    """Return the first word of how a run ended: finished, pruned, failed, ..."""
    return re.split(r"\W", status)[0]


def rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort: failures first, since they want a decision; then by val loss, best first, NaN last; then pruned runs."""

    def key(row: dict[str, Any]) -> tuple[int, float]:
        loss = row.get(LOSS.figure)
        return {"finished": 1, "pruned": 2}.get(outcome(row["status"]), 0), loss if loss is not None else math.inf

    return sorted(rows, key=key)


def plus_minus(results: dict[str, Any], split: str, figure: str, digits: int) -> str:
    """Format a figure and its standard error, or a dash for the error of a text too short to have one."""
    value, error = results[f"{split}/{figure}"], results[f"{split}/{figure}_se"]
    return f"{value:.{digits}f} ± " + ("-" if error is None or math.isnan(error) else f"{error:.{digits}f}")


def short(value: Any) -> str:
    """Format a value; floats get four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: list[dict[str, Any]], settings: Sequence[str]) -> None:
    """Write the runs for a spreadsheet or a notebook: settings, status, the figures of COLUMNS, then all others."""
    first = [*settings, "status", *(column.figure for column in COLUMNS)]
    known = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in dict.fromkeys([*first, *known]) if key in known]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))

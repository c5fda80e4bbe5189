"""Runs as lines of a table, on the terminal and as CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from charlm.files import write_atomically


def outcome(status: str) -> str:
    """The first word of how a run ended: finished, pruned, failed or another that is neither."""
    return re.split(r"\W", status)[0]


def rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Failures first, since they want a decision; then by val loss, best first, and NaN last; then pruned ones."""

    def key(row: dict[str, Any]) -> tuple[int, float]:
        loss = row.get("val/loss")
        return {"finished": 1, "pruned": 2}.get(outcome(row["status"]), 0), loss if loss is not None else math.inf

    return sorted(rows, key=key)


def plus_minus(found: dict[str, Any], split: str, figure: str, digits: int) -> str:
    """A figure and its standard error, or a dash for an error that a short text cannot give."""
    value, error = found[f"{split}/{figure}"], found[f"{split}/{figure}_se"]
    return f"{value:.{digits}f} ± " + ("-" if error is None else f"{error:.{digits}f}")


def runs_table(rows: list[dict[str, Any]], settings: list[str], title: str, without: Sequence[str] = ()) -> Table:
    """Runs as lines: what was set, and what came of it; `without` columns of the latter."""
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for setting in settings:
        widest = max([len(short(row[setting])) for row in rows], default=0)
        shown.add_column(setting.rpartition(".")[2], justify="right", overflow="fold", min_width=min(widest, 28))
    found = [figures_of(row) for row in rows]
    columns = [column for column in found[0] if column not in without] if found else []
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row, figures in zip(rows, found, strict=True):
        style = {"finished": None, "pruned": "dim"}.get(outcome(row["status"]), "bold red")
        told = (Text(short(row[setting])) for setting in settings)  # callbacks=[default] is no markup
        shown.add_row(*told, *(figures[column] for column in columns), style=style)
    return shown


def figures_of(row: dict[str, Any]) -> dict[str, str]:
    """The columns of a run's line, by their heads."""
    loss, error = row.get("val/loss"), "val/loss_se" in row  # which the last one of a run that was pruned has not
    told = {"val/bits_per_char": ("bits/char", 4), "val/perplexity": ("perplexity", 3), "train/seconds": ("seconds", 1)}
    if loss is None:
        figures = {"val loss": "-"}
    else:
        figures = {"val loss": plus_minus(row, "val", "loss", 4) if error else f"{loss:.4f}"}
    for name, (head, digits) in told.items():
        value = row.get(name) if loss is not None else None
        figures[head] = "-" if value is None else f"{value:.{digits}f}"
    return figures | {"status": outcome(row["status"])}


def short(value: Any) -> str:
    """Format a value; floats get four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The same lines for a spreadsheet or a notebook."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))

"""A study as one reads it on a terminal: what to know first, what went wrong, the table, what each setting did."""

import statistics
from collections.abc import Sequence
from functools import partial

from rich import box
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from charlm.study.runs import Run
from charlm.study.study import CRITERION, Row, Study
from charlm.terminal import as_wide_as_fits

MOST_ROWS = 30
MOST_VALUES = 8
MARKS = {"within noise": "≈ best", "one seed": "?"}  # as a terminal is narrow
# Columns that a narrow terminal drops, in this order.
SPARE = ("perplexity", "tokens", "seconds", "bits/char")


def text(study: Study, console: Console) -> RenderableType:
    """All of it, as wide as fits."""
    parts: list[RenderableType] = [
        Text(f"! {note.text}", "bold red") if note.loud else Text(f"- {note.text}") for note in study.notes
    ]
    if study.failed:
        parts += [unfinished(study, study.failed, "without a final figure", "bold red")]
    if study.rows:
        parts += [Text(), table(study, console), Text(legend(study), "dim")]
        parts += [Text(), settings(study)] if study.varied else []
    if study.others:
        parts += [unfinished(study, study.others, "not finished", "")]
    return Group(*parts)


def table(study: Study, console: Console) -> Table:
    """Return the table of rows, best first, without columns that do not fit."""
    return as_wide_as_fits(partial(lines, study), SPARE, console)


def lines(study: Study, without: Sequence[str]) -> Table:
    rows = study.rows[:MOST_ROWS]
    cells = [cells_of(study, row) for row in rows]
    if all(len(row.runs) == 1 for row in study.rows):  # one seed per row: no statistics over seeds
        without = [*without, "seeds", "vs best"]
    columns = [column for column in cells[0] if column not in without]
    runs = sum(len(row.runs) for row in study.rows)
    made = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        title=f"{runs} finished run{'s' * (runs > 1)}, by val loss (nats per character)",
    )
    made.title_justify, made.title_style = "left", "bold"
    for name in study.swept:
        made.add_column(Text(study.labels[name]), justify="right", overflow="fold", max_width=28)
    for column in columns:  # which are whole, however narrow that makes the settings
        width = max(len(column), *(len(found[column]) for found in cells))
        justify: JustifyMethod = "left" if column == "vs best" else "right"
        made.add_column(column, justify=justify, min_width=width, no_wrap=True)
    for row, found in zip(rows, cells, strict=True):
        told = [Text(study.told[name][row.settings[name]] if name in row.settings else "-") for name in study.swept]
        style = {"best": "bold", MARKS["within noise"]: "green"}.get(found["vs best"])
        made.add_row(*told, *(found[column] for column in columns), style=style)
    return made


def cells_of(study: Study, row: Row) -> dict[str, str]:
    error = row.error
    one = len(row.runs) == 1
    cells = {"val loss": f"{row.loss:.4f} ± " + ("-" if error is None else f"{error:.4f}") + "*" * one}
    cells["seeds"] = str(len(row.runs))
    for title, figure, digits in (
        ("bits/char", "val/bits_per_char", 4),
        ("perplexity", "val/perplexity", 3),
        ("seconds", "train/seconds", 1),
        ("tokens", "train/tokens", 0),
    ):
        mean = row.mean(figure)
        cells[title] = "-" if mean is None else f"{mean:,.{digits}f}"
    return cells | {"vs best": MARKS.get(verdict := study.verdict(row), verdict)}


def legend(study: Study) -> str:
    """Explain the ± and the last column."""
    seeds = {len(row.runs) for row in study.rows}
    told = ["± is the standard deviation over seeds."] if max(seeds) > 1 else []
    told += ["±* is the standard error of the text, as there is one seed."] if 1 in seeds else []
    told += [f"≈ best: {CRITERION}"] if len(study.rows) > 1 and max(seeds) > 1 else []
    told += [f"{len(study.rows) - MOST_ROWS} more rows are in the HTML file."] if len(study.rows) > MOST_ROWS else []
    return " ".join(told)


def settings(study: Study) -> Table:
    """Return the best loss of each value of a setting over all others, the most influential setting first."""
    made = Table("", "", "rows", "best", "median", box=box.SIMPLE_HEAD, title="One setting at a time: val loss")
    made.title_justify, made.title_style = "left", "bold"
    for column in made.columns[1:]:
        column.justify = "right"
    for name in study.varied:
        best = study.best_by_value(name)
        top = min(best, key=lambda value: best[value].loss)
        many = len(best) > MOST_VALUES
        for i, value in enumerate([top] if many else best):
            losses = [row.loss for row in study.rows if row.settings.get(name, row) == value]
            told = Text(study.labels[name] + f", the best of {len(best)}" * many if i == 0 else "")
            figures = str(len(losses)), f"{best[value].loss:.4f}", f"{statistics.median(losses):.4f}"
            made.add_row(told, Text(study.told[name][value]), *figures, style="bold" if value == top else "")
        made.add_section()
    return made


def unfinished(study: Study, runs: Sequence[Run], title: str, style: str) -> RenderableType:
    """A line for each run: its state, its folder, its newest loss, and why."""
    told = [Text(f"{len(runs)} {title}", "bold")]
    for run in runs[:MOST_ROWS]:
        last = f", val loss {run.last:.4f}" if run.last is not None else ""
        why = f": {run.reason}" if run.reason else ""
        told.append(Text.assemble((f"{run.state:9}", style), study.near(run), last, why))
    if len(runs) > MOST_ROWS:
        told.append(Text(f"and {len(runs) - MOST_ROWS} more", "dim"))
    return Padding(Group(told[0], *(Padding(one, (0, 0, 0, 2)) for one in told[1:])), (1, 0))

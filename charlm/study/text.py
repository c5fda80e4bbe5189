"""A study on the terminal: notes, failed runs, the table, the effect of each setting; verdicts; a scaling law."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from charlm.meaning import NOTHING
from charlm.run.table import COLUMNS, LOSS, Line, terminal_table
from charlm.study.comparison import ALPHA, Comparison, System
from charlm.study.law import LEVEL
from charlm.study.runs import Run
from charlm.study.scaling import Cell, Prediction, Scaling
from charlm.study.study import Row, Study

MOST_ROWS = 30
MOST_VALUES = 8
HEADS = ("parameters N", "tokens D", "FLOPs C", "seeds", "measured", "law")  # the cells of a scaling law
MARKS = {"within noise": "≈ best"}  # as a terminal is narrow


def text(
    study: Study, console: Console, columns: Sequence[str] | None = None, others: Mapping[str, float] = NOTHING
) -> RenderableType:
    """Return the whole text of a study, fitted to the console.

    Args:
        columns: names of settings to show; None: all that were swept.
        others: losses on the same text, by what reaches them; they are shown next to `Study.references`.
    """
    parts: list[RenderableType] = [
        Text(f"! {note.text}", "bold red") if note.loud else Text(f"- {note.text}") for note in study.notes
    ]
    if study.failed:
        parts += [unfinished(study, study.failed, "without a final figure", "bold red")]
    if study.rows:
        parts += [Text(), table(study, console, study.swept if columns is None else columns)]
        parts += [Text(legend(study), "dim")]
        parts += [Text(), references(study, others)] if study.references else []
        parts += [Text(), *map(Text, study.meaning)] if study.meaning else []
        parts += [Text(), settings(study)] if study.varied else []
    if study.others:
        parts += [unfinished(study, study.others, "not finished", "")]
    return Group(*parts)


def references(study: Study, others: Mapping[str, float]) -> Table:
    """Return the table of what reaches which loss without training, with the best row among it."""
    made = Table("", "val loss", box=box.SIMPLE_HEAD, title=study.same_text)
    made.title_justify, made.title_style = "left", "bold"
    made.columns[1].justify = "right"
    best = f"the best row: {study.label(study.rows[0])}" if study.swept else "the best row"
    lines = [*({**study.references, **others}).items(), (best, study.rows[0].loss)]
    for name, loss in sorted(lines, key=lambda line: line[1]):
        made.add_row(Text(name), f"{loss:.4f}", style="bold" if name == best else "")
    return made


def table(study: Study, console: Console, names: Sequence[str]) -> Table:
    """Return the table of rows, best first, without columns that do not fit.

    Args:
        names: of the settings to show.
    """
    lines = [line_of(study, row, names) for row in study.rows[:MOST_ROWS]]
    without = ("seeds",) * all(row.seeds == 1 for row in study.rows) + ("vs best",) * (len(study.rows) == 1)
    without += ("folds",) * (not study.folds)
    runs = sum(len(row.runs) for row in study.rows)
    title = f"{runs} finished run{'s' * (runs > 1)}, by val loss (nats per character)"
    return terminal_table(title, [study.labels[name] for name in names], lines, console, without)


def line_of(study: Study, row: Row, names: Sequence[str]) -> Line:
    settings = [study.formatted[name][row.settings[name]] if name in row.settings else "-" for name in names]
    verdict = study.verdict(row)
    one_seed = len(row.runs) == 1
    cells = {
        LOSS.head: f"{LOSS.format(row.loss)} ± {LOSS.format(row.error())}" + "*" * one_seed,
        "folds": str(len(row.folds) or "-"),
        "seeds": str(row.seeds),
        **{column.head: column.format(row.mean(column.figure)) for column in COLUMNS if column != LOSS},
        "vs best": MARKS.get(verdict, verdict),
    }
    return Line(settings, cells, {"best": "bold", "within noise": "green"}.get(verdict, ""))


def legend(study: Study) -> str:
    """Explain the ± and the last column."""
    parts = [study.legend]
    parts += [study.criterion] if len(study.rows) > 1 else []
    parts += [f"{len(study.rows) - MOST_ROWS} more rows are in the HTML file."] if len(study.rows) > MOST_ROWS else []
    return " ".join(parts)


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
            label = Text(study.labels[name] + f", the best of {len(best)}" * many if i == 0 else "")
            figures = str(len(losses)), f"{best[value].loss:.4f}", f"{statistics.median(losses):.4f}"
            made.add_row(label, Text(study.formatted[name][value]), *figures, style="bold" if value == top else "")
        made.add_section()
    return made


def unfinished(study: Study, runs: Sequence[Run], title: str, style: str) -> RenderableType:
    """List runs with state, folder, newest loss and reason."""
    lines = [Text(f"{len(runs)} {title}", "bold")]
    for run in runs[:MOST_ROWS]:
        last = f", val loss {run.last:.4f}" if run.last is not None else ""
        why = f": {run.reason}" if run.reason else ""
        lines.append(Text.assemble((f"{run.state:9}", style), study.near(run), last, why))
    if len(runs) > MOST_ROWS:
        lines.append(Text(f"and {len(runs) - MOST_ROWS} more", "dim"))
    return Padding(Group(lines[0], *(Padding(line, (0, 0, 0, 2)) for line in lines[1:])), (1, 0))


def compared(
    systems: Sequence[System],
    found: Sequence[Comparison],
    settings: Sequence[dict[str, Any]],
    notes: Sequence[str],
    context: int,
) -> RenderableType:
    """Return what differs between systems, their losses, and the verdicts: `charlm.study.comparison`."""
    letters = [chr(ord("A") + i) for i in range(len(systems))]
    table = Table("", "", "seeds", "nats per character", box=box.SIMPLE_HEAD)
    for letter, system in zip(letters, systems, strict=True):
        spread = f" ± {system.losses.std(ddof=1):.4f} over seeds" if len(system.losses) > 1 else ""
        if k := len(system.folds):
            spread = f" ± {system.nats.std(ddof=1) / math.sqrt(k):.4f}, the standard error over {k} folds"
        name = Text(system.name, overflow="fold")
        table.add_row(letter, name, str(len(system.seeds)), f"{system.loss:.4f}{spread}")
    parts: list[RenderableType] = [table]
    if settings:
        differs = Table("what differs", *letters, box=box.SIMPLE_HEAD)
        for one in settings:
            differs.add_row(one["setting"], *one["values"])
        parts.append(differs)
    parts += [Text(f"- {note}") for note in notes]
    each = f"each after {context} or more" if context > 1 else "in windows that do not overlap"
    first = found[0]
    of = f"characters, of {first.n_folds} documents that were held out in turn," if first.n_folds else "characters"
    parts.append(Text(f"The same {of} for all, {each}. Against A:", style="dim"))
    for letter, verdict in zip(letters[1:], found, strict=True):
        parts.append(Text(f"  {verdict.text(letter)}", style="bold" if verdict.verdict != "within noise" else ""))
    error = (
        f"± is the standard error of the mean over {first.n_folds} folds, from the spread of the differences on the "
        f"same document; p values are those of t tests with {first.n_folds - 1} degrees of freedom."
        if first.n_folds
        else f"± is the standard error: of the text, paired by blocks of 1,000 characters ({first.paired:.4f}), and of "
        f"the seed, with a standard deviation of {first.seed_sd:.4f} {first.seed_sd_from}."
    )
    parts.append(Text(error, style="dim"))
    return Group(*parts)


def scaling_text(found: Scaling) -> RenderableType:
    """Return the scaling law of a study: its cells, the law, and what it predicts."""
    cells = Table(*HEADS, box=box.SIMPLE_HEAD, title="Scaling law: val loss, nats per character")
    law = Table("", "estimate", f"{LEVEL:.0%} interval", box=box.SIMPLE_HEAD)
    for table, left in ((cells, 0), (law, 1)):
        table.title_justify, table.title_style = "left", "bold"
        for column in table.columns[left:]:
            column.justify = "right"
    for cell in found.cells:
        cells.add_row(*cell_texts(found, cell))
    for name, interval in found.intervals.items():
        law.add_row(name, f"{interval.value:.4g}", f"{interval.low:.4g} to {interval.high:.4g}")
    return Group(Text(), cells, Text(formula(found)), law, *map(Text, predictions(found)))


def cell_texts(found: Scaling, cell: Cell) -> list[str]:
    """Return a row of the table of cells, under HEADS."""
    spread = f" ± {cell.sd:.4f}" if cell.sd is not None else ""
    sizes = [f"{cell.n:,.0f}", f"{cell.d:,.0f}", f"{cell.compute:.2e}", str(len(cell.losses))]
    return [*sizes, f"{cell.loss:.4f}{spread}", f"{found.predicted(cell):.4f}"]


def formula(found: Scaling) -> str:
    """Return the law as one line."""
    E, A, alpha, B, beta = (found.intervals[name].value for name in ("E", "A", "alpha", "B", "beta"))
    return f"L(N, D) = {E:.4g} + {A:.4g} / N^{alpha:.3g} + {B:.4g} / D^{beta:.3g}"


def quality(found: Scaling) -> str:
    """Compare the distances of cells from the law with what the spread of seeds explains."""
    misfit = found.fit.misfit
    line = f"The runs of one size and budget lie {misfit.apart:.2%} from the law on average (root mean square)"
    if misfit.p is None:
        return f"{line}; with one seed each, nobody can tell whether that is noise."
    line += f", and the spread of seeds alone makes {misfit.by_seeds:.2%}"
    if misfit.p >= ALPHA:
        return f"{line}: the law describes them (F test, p = {misfit.p:.2g})."
    far = max(found.cells, key=lambda cell: abs(cell.loss / found.predicted(cell) - 1))
    return (
        f"{line}: the law does NOT describe all of them (F test, p = {misfit.p:.2g}), which its intervals allow for as "
        f"noise. The farthest is N = {far.n:,.0f}, D = {far.d:,.0f}."
    )


def predictions(found: Scaling) -> list[str]:
    """Return what the law predicts: held-out runs next to their outcome, and the next model."""
    lines = [outcome(found, check) for check in found.checks]
    lines += [] if lines else ["No run has 3 times the compute of all others, so none was held out to check the law."]
    ahead = found.next
    times = ahead.compute / max(cell.compute for cell in [*found.cells, *found.held_out])
    return [
        quality(found),
        *lines,
        "The best N for a compute C grows as C^a, where C is proportional to N D.",
        f"Next: for {times:.0f} times the largest compute, the best model has N = {ahead.n:,.0f} and D = "
        f"{ahead.d:,.0f}; predicted {ahead.loss.value:.4f}, {LEVEL:.0%} interval of one run {ahead.loss.low:.4f} to "
        f"{ahead.loss.high:.4f}.",
    ]


def outcome(found: Scaling, check: Prediction) -> str:
    """Compare the prediction of a held-out cell with its outcome."""
    assert check.measured is not None
    seeds, apart = len(check.measured.losses), check.measured.loss - check.loss.value
    times = check.compute / max(cell.compute for cell in found.cells)
    of = f"the mean of {seeds} seeds" if seeds > 1 else "one run"
    return (
        f"Held out: N = {check.n:,.0f}, D = {check.d:,.0f}, {times:.2f} times the largest compute of the fit. "
        f"Predicted {check.loss.value:.4f}, {LEVEL:.0%} interval of {of} {check.loss.low:.4f} to "
        f"{check.loss.high:.4f}; "
        f"measured {check.measured.loss:.4f}: {'within' if check.within else 'OUTSIDE'} the interval, "
        f"{abs(apart):.4f} {'above' if apart > 0 else 'below'} the prediction."
    )

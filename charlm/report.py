"""What runs found: one results.json for each, one table for many."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from charlm.disk import read_regular, write_atomically
from charlm.errors import InputError, printable
from charlm.recorded import everything

T = TypeVar("T")

LOSSES = "losses.f32"  # of all steps: numpy.fromfile(file, "<f4")
VALIDATIONS = "validations.csv"  # step, seconds of training, val/loss; a line for each validation
RESULTS = "results.json"  # written last, so that its presence means a finished run
LARGEST = 2**24  # bytes of a file that is read

Results = TypedDict(
    "Results",
    {
        "status": Literal["finished"],
        "steps": Annotated[int, Ge(0)],
        "stopped_by": str,
        "min_context": Annotated[int, Ge(1)],
        "references": dict[str, dict[str, float | None]],
        "train/tokens": Annotated[int, Ge(0)],
        "train/seconds": float | None,
        "val/loss": float | None,
        "val/loss_se": float | None,
        "val/bits_per_char": float | None,
        "val/perplexity": float | None,
    },
)
Results.__doc__ = (
    """What every results.json holds, with figures such as train/loss. None stands for NaN and infinity."""
)


def as_json(content: Any) -> bytes:
    """For programs, and for people who look into a file."""
    return (json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Whole, or not at all."""
    write_atomically(path, lambda file: file.write(as_json(content)))


def read_json(file: Path, kind: type[T], largest: int, format: int | None = None) -> T:
    """A file that `write_json` wrote, held against `kind`; perhaps a stranger's, so that nothing in it is trusted.

    Raises:
        InputError: if it is no regular file, too large, damaged or of another version.
        FileNotFoundError: if there is none.
    """
    try:
        content: Any = json.loads(read_regular(file, largest), parse_constant=refuse_constant)
        for _ in everything(file, content):  # which looks for what is nested too deep
            pass
        TypeAdapter(kind).validate_python(content, strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged, or of another version") from None
    if format is not None and content["format"] != format:
        raise InputError(f"{file} has format {content['format']}, and this charlm reads format {format}")
    found: T = content
    return found


def refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON, though Python reads them; `as_json` writes null instead."""
    raise ValueError(name)


def read_results(run_dir: Path) -> Results | None:
    """The final figures of a run, or None if it did not get that far.

    Raises:
        InputError: for a results.json that charlm has not written like that.
    """
    try:
        found = read_json(run_dir / RESULTS, Results, LARGEST)
    except FileNotFoundError:
        return None
    for name, value in found.items():
        figure = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
        if not figure and name != "references":
            raise InputError(f"{run_dir / RESULTS} is damaged: {printable(name, 100)} is not a figure")
    return found


def whole_results(run_dir: Path) -> Results | None:
    """The final figures of a run, or None if it did not get that far, or if they are damaged: as if it had not."""
    try:
        return read_results(run_dir)
    except (InputError, OSError):
        return None


def read_validations(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, seconds of training and val loss of each validation, in order, as far as they can be read."""
    try:
        lines = read_regular(run_dir / VALIDATIONS, LARGEST).decode(errors="replace").split("\n")
    except (InputError, OSError):
        return []
    found = []
    for line in lines[1:-1]:  # between the head and what is not yet a whole line
        with suppress(ValueError):
            step, seconds, loss = line.split(",")
            found.append((int(step), float(seconds), float(loss)))
    return found


def name_of(node: dict[str, Any]) -> str:
    """What a configuration node is called: the last part of its `_target_`, which is also the name of its file."""
    return str(node["_target_"]).rpartition(".")[2].lower()


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(status: str) -> str:
    """The first word of how a run ended: finished, pruned, failed or another that is neither."""
    return re.split(r"\W", status)[0]


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Failures first, since they want a decision; then by val loss, best first, and NaN last; then pruned ones."""

    def key(row: dict[str, Any]) -> tuple[int, float]:
        loss = row.get("val/loss")
        return {"finished": 1, "pruned": 2}.get(verdict(row["status"]), 0), loss if loss is not None else math.inf

    return sorted(rows, key=key)


def plus_minus(found: dict[str, Any], split: str, figure: str, digits: int) -> str:
    """A figure and its standard error, or a dash for an error that a short text cannot give."""
    value, error = found[f"{split}/{figure}"], found[f"{split}/{figure}_se"]
    return f"{value:.{digits}f} ± " + ("-" if error is None else f"{error:.{digits}f}")


def table(rows: list[dict[str, Any]], settings: list[str], title: str, without: Sequence[str] = ()) -> Table:
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
        style = {"finished": None, "pruned": "dim"}.get(verdict(row["status"]), "bold red")
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
    return figures | {"status": verdict(row["status"])}


def short(value: Any) -> str:
    """A value as one reads it: of a number that nobody typed, four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The same lines for a spreadsheet or a notebook."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))

"""The result files of a run: results.json, losses and validations."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge
from typing_extensions import TypedDict

from charlm.errors import InputError, printable
from charlm.files import read_json, read_regular

T = TypeVar("T")

LOSSES = "losses.f32"  # of all steps: numpy.fromfile(file, "<f4")
VALIDATIONS = "validations.csv"  # step, seconds of training, val/loss; a line for each validation
RESULTS = "results.json"  # written last, so that its presence means a finished run
LARGEST_RESULTS = 2**24  # bytes of a file that is read

Results = TypedDict(
    "Results",
    {
        "status": Literal["finished"],
        "steps": Annotated[int, Ge(0)],
        "stopped_by": str,
        "min_context": Annotated[int, Ge(1)],
        "baselines": dict[str, dict[str, float | None]],
        "train/tokens": Annotated[int, Ge(0)],
        "train/seconds": float | None,
        "val/loss": float | None,
        "val/loss_se": float | None,
        "val/nats_per_char": float | None,
        "val/nats_per_char_se": float | None,
        "val/bits_per_char": float | None,
        "val/perplexity": float | None,
    },
)
Results.__doc__ = (
    """What every results.json holds, with figures such as train/loss. None stands for NaN and infinity."""
)


def read_results(run_dir: Path) -> Results | None:
    """Return the final figures of a run; None if it has none yet.

    Raises:
        InputError: if charlm did not write the file.
    """
    try:
        found = read_json(run_dir / RESULTS, Results, LARGEST_RESULTS)
    except FileNotFoundError:
        return None
    for name, value in found.items():
        figure = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
        if not figure and name != "baselines":
            raise InputError(f"{run_dir / RESULTS} is damaged: {printable(name, 100)} is not a figure")
    return found


def in_characters(results: Results) -> dict[str, float | None]:
    """Return val/loss and its error in nats per character, in which runs with different tokenizers compare."""
    return {"val/loss": results["val/nats_per_char"], "val/loss_se": results["val/nats_per_char_se"]}


def whole_results(run_dir: Path) -> Results | None:
    """Return the final figures of a run; None if it has none or if they are damaged."""
    try:
        return read_results(run_dir)
    except (InputError, OSError):
        return None


def read_validations(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, seconds of training and val loss of each validation, in order, as far as they can be read."""
    try:
        lines = read_regular(run_dir / VALIDATIONS, LARGEST_RESULTS).decode(errors="replace").split("\n")
    except (InputError, OSError):
        return []
    found = []
    for line in lines[1:-1]:  # without the header and an incomplete last line
        with suppress(ValueError):
            step, seconds, loss = line.split(",")
            found.append((int(step), float(seconds), float(loss)))
    return found

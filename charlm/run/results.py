"""The result files of a run: results.json, losses and validations."""

import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge
from typing_extensions import TypedDict

from charlm.errors import InputError, printable
from charlm.files import read_json, read_regular, write_atomically, write_json

T = TypeVar("T")

LOSSES = "losses.f32"  # of all steps: numpy.fromfile(file, "<f4")
VALIDATIONS = "validations.csv"  # step, seconds of training, val/loss; a line for each validation
BLOCKS = "val_blocks.csv"  # characters, nats: the loss of each part of val, where all of it was scored
RESULTS = "results.json"  # written last, so that its presence means a finished run
CERTIFIED = "certified"  # the checks that the last state passed
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


def certify(run_dir: Path, step: int, checks: Iterable[str]) -> None:
    """Write into the results of a finished run which checks its last state passed: `charlm.certify`.

    Without effect where there are no results, or those of another step.
    """
    found: Any = whole_results(run_dir)
    if found and found["steps"] == step:
        rest = {name: value for name, value in found.items() if name != CERTIFIED}
        write_json(run_dir / RESULTS, {**rest, **({CERTIFIED: "; ".join(checks)} if checks else {})})


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


def write_blocks(run_dir: Path, characters: Iterable[float], nats: Iterable[float]) -> None:
    """Write the characters of each block of val and the sum of their losses."""
    lines = [f"{int(n)},{float(loss):.6f}\n" for n, loss in zip(characters, nats, strict=True)]
    text = "".join(["characters,nats\n", *lines]).encode()
    write_atomically(run_dir / BLOCKS, lambda file: file.write(text))


def read_blocks(run_dir: Path) -> list[tuple[float, float]]:
    """Return characters and nats of each block of val; none if the file is missing or damaged."""
    try:
        lines = read_regular(run_dir / BLOCKS, LARGEST_RESULTS).decode().splitlines()
        found = [(float(n), float(loss)) for n, loss in (line.split(",") for line in lines[1:])]
    except (InputError, OSError, ValueError):
        return []
    return found if all(n > 0 and math.isfinite(loss) for n, loss in found) else []

"""Run folders -> runs: how each ended, its settings and its figures.

Nothing in a folder is trusted: files are read as plain types, damaged ones are named and left out, and names that are
shown have no control characters.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from charlm.errors import InputError, printable
from charlm.files import is_regular
from charlm.run.folder import SWEEP_JSON
from charlm.run.overrides import typed
from charlm.run.record import RUN_JSON, Record, flat, read_record
from charlm.run.results import CERTIFIED, RESULTS, in_characters, read_blocks, read_results, read_validations
from charlm.schema import name_of
from charlm.sweep import ledger

Value = str | int | float | bool | None
LONGEST = 120  # characters of a name or a value that is shown
SIGN_OF_LIFE = 60.0  # seconds; a run at work writes run.json every ten
FAILED = ("failed", "killed", "stopped")  # states that need a decision
STATES = (*FAILED, "finished", "pruned", "running", "waiting")
# No settings: where a run is, how it was begun, and how it is evaluated; what follows the machine, unless somebody
# asked for it; and the text, which its name and its hash identify.
PLACES = {"run_dir", "resume", "rerun", "stop_at", "seed", "evaluate", "sample_length"}
CHOSEN = {"threads", "speed.steps_per_execution"}
TEXT = {"data.corpus", "data.path", "data.fallback"}
FOLD = "data.fold"
HELD_OUT = "held out"  # stands for each number of data.fold among the settings
TYPED = ("experiment", "callbacks", "logger")  # choices that a config does not name, only their values


@dataclass(frozen=True)
class Run:
    """A run, or a job of a sweep that has not begun.

    Args:
        name: its folder, as one reads it.
        state: one of STATES; `reason` says why.
        seed: None without a run.json.
        fold: number of the document that is val; None: val is the end of the text.
        settings: all that it was trained with, by dotted names; a choice by its group: {"model": "gpt"}.
        given: the names of those that its command line set, in its order.
        figures: the numbers of its results.json, by their names there and below: "baselines.val.bigram".
        certified: the checks that it passed, joined by "; ".
        stopped_by: what ended the training of a run that has finished.
        validations: step, seconds and val loss of each.
        record: its run.json.
        folder: its folder.
    """

    name: str
    state: str
    reason: str | None
    seed: int | None
    settings: dict[str, Value]
    given: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    stopped_by: str = ""
    certified: str = ""
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    record: Record | None = None
    folder: str = ""
    fold: int | None = None

    @property
    def follows(self) -> Collection[str]:
        """The settings that refer to others, such as data.seed to the seed."""
        return self.record["follows"] if self.record else ()

    @property
    def loss(self) -> float | None:
        """The final val loss, nats per character."""
        return self.figures.get("val/loss") if self.state == "finished" else None

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """The evaluated text, the least context of its characters, and the fold."""
        corpus = (self.record and self.record["corpus"]) or {}
        parts = (self.settings.get(f"data.{part}_fraction") for part in ("val", "test"))
        return (corpus.get("sha256"), *parts, self.figures.get("min_context", 1.0), self.fold)

    @cached_property
    def blocks(self) -> list[tuple[float, float]]:
        """Characters and nats of each block of val; none if the run does not have them, or if they are of other losses
        than its results.
        """
        found = read_blocks(Path(self.folder)) if self.folder and self.loss is not None else []
        loss = sum(nats for _, nats in found) / sum(n for n, _ in found) if found else math.nan
        return found if math.isclose(loss, self.figures.get("val/loss", 0.0), abs_tol=1e-3) else []

    @property
    def lost(self) -> bool:
        """Return whether the loss is above that of guessing."""
        return self.loss is not None and self.loss > self.figures.get("baselines.val.uniform", math.inf)

    @property
    def last(self) -> float | None:
        """The newest known val loss."""
        return self.loss if self.loss is not None else self.validations[-1][2] if self.validations else None


def read_runs(places: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return all runs below folders, each once, and a line for each that cannot be read.

    Jobs of a sweep without a folder are included.

    Raises:
        InputError: if one of `places` is no folder.
    """
    folders: dict[str, Path] = {}  # keys: real paths
    sweeps: dict[str, Path] = {}
    for place in places:
        if not os.path.isdir(place):
            raise InputError(f"{place} is no folder: give folders of runs or of sweeps, such as outputs")
        for folder, files in walk(place):
            for name, found in ((RUN_JSON, folders), (SWEEP_JSON, sweeps)):
                if name in files:
                    found.setdefault(os.path.realpath(folder), folder)
    runs, damaged = [], []
    entries: dict[str, ledger.Entry] = {}
    for real in dict.fromkeys([*sweeps, *map(os.path.dirname, folders)]):
        try:
            entries |= {os.path.join(real, name): entry for name, entry in jobs_of(Path(real)).items()}
        except (InputError, OSError) as error:
            damaged += [message_of(error)] if real in sweeps else []
    for real, folder in folders.items():
        try:
            runs.append(read_run(folder, entries.get(real)))
        except (InputError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            damaged.append(message_of(error) if isinstance(error, InputError | OSError) else f"{folder} is damaged")
    for real, entry in entries.items():
        if real not in folders and os.path.dirname(real) in sweeps:
            runs.append(waiting(sweeps[os.path.dirname(real)] / os.path.basename(real), entry))
    return runs, [printable(line, 300) for line in damaged]


def walk(place: Path) -> Iterator[tuple[Path, Sequence[str]]]:
    """Yield the folders below `place` and the files in each. Only links to runs are followed, so loops end."""
    for folder, below, files in os.walk(place):
        below.sort()
        yield Path(folder), files
        for name in below:
            path = Path(folder, name)
            if path.is_symlink() and is_regular(path / RUN_JSON):
                yield path, [RUN_JSON]


def jobs_of(sweep_dir: Path) -> dict[str, ledger.Entry]:
    """Return the jobs of a sweep by the names of their folders, read-only; none if it is no sweep."""
    file = sweep_dir / SWEEP_JSON
    return ledger.read(file)["jobs"] if os.path.lexists(file) else {}


def read_run(folder: Path, entry: ledger.Entry | None) -> Run:
    """Read a run folder; `entry` is its job in sweep.json.

    Raises:
        InputError, OSError, ValueError, ArithmeticError, RecursionError: if it is damaged.
    """
    record = read_record(folder)
    found = read_results(folder)
    results: Any = found | in_characters(found) if found else {}
    state, reason = state_of(record, entry, bool(results))
    given = given_in(entry["overrides"] if entry else shlex.split(record["command"])[2:])
    validations = read_validations(folder)
    numbers = flat(results).items()
    figures = {name: float(leaf) for name, leaf in numbers if isinstance(leaf, int | float) and sane(leaf)}
    if state == "finished" and "val/loss" not in figures:
        reason = (
            "its val loss is no number" if "val/loss" in results else "val is not among the splits that it evaluates"
        )
    return Run(
        printable(str(folder), LONGEST),
        state,
        reason and printable(reason, 300),
        record["seed"],
        settings_of(record, given),
        tuple(given),
        figures,
        printable(str(results.get("stopped_by", "")), LONGEST),
        printable(str(results.get(CERTIFIED, "")), 500),
        [validation for validation in validations if all(map(sane, validation))],
        record,
        str(folder),
        fold_of(record),
    )


def waiting(folder: Path, entry: ledger.Entry) -> Run:
    """Return the run of a job that has written nothing."""
    given = given_in(entry["overrides"])
    seed = given.get("seed", "")
    state, reason = entry["state"], because(entry)
    return Run(
        printable(str(folder), LONGEST),
        state if state in ("failed", "pruned") else "waiting",
        reason and printable(reason, 300),
        int(seed) if seed.isdecimal() else None,
        {name: parsed(value) for name, value in given.items() if name not in PLACES | TEXT | {"data", FOLD}},
        tuple(given),
    )


def fold_of(record: Record) -> int | None:
    """Return the number of the document that a run holds out; None if it does not."""
    fold = (record["config"].get("data") or {}).get("fold")
    return fold if isinstance(fold, int) else None


def state_of(record: Record, entry: ledger.Entry | None, results: bool) -> tuple[str, str | None]:
    """Return the state of a run and its reason: from run.json or, if that could not be written, from sweep.json."""
    state, reason = record["status"], record["reason"]
    if state == "finished":
        return (state, None) if results else ("failed", f"its {RESULTS} is gone")
    if entry and entry["state"] == "pruned":
        return "pruned", because(entry)
    if state == "running":
        if entry and entry["state"] == "failed" and entry["reason"]:
            return "failed", because(entry)
        if silent(record["heartbeat"]):
            return "killed", f"no sign of life since {record['heartbeat']}, step {record['step']:,}"
        return "running", f"at step {record['step']:,}"
    if state == "stopped":
        return state, f"by {reason} after step {record['step']:,}"
    return ("failed", reason) if state == "failed" else ("failed", f"its {RUN_JSON} calls it {state}")


def because(entry: ledger.Entry) -> str | None:
    """Return the reason in a ledger without the leading state: "failed: out of memory", "pruned at step 500"."""
    return re.sub(r"^(failed|pruned):? ", "", entry["reason"]) if entry["reason"] else None


def silent(heartbeat: str) -> bool:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(heartbeat)).total_seconds() > SIGN_OF_LIFE
    except (ValueError, TypeError):
        return True


def given_in(words: Iterable[str]) -> dict[str, str]:
    """Return the settings of a command line by name."""
    pairs = (word.partition("=") for word in words if "=" in word and not word.startswith(("hydra", "-", "~")))
    return {name.lstrip("+"): value for name, _, value in pairs}


def settings_of(record: Record, given: dict[str, str]) -> dict[str, Value]:
    """Return the settings of a run, except those that depend on its folder."""
    found: dict[str, Value] = {}
    run_dir = str(record["config"].get("run_dir") or "\0")
    for name, leaf in flat(record["config"]).items():
        group, _, key = name.rpartition(".")
        if name in PLACES | TEXT or (name in CHOSEN and name not in given):
            continue
        if key == "_target_":
            found[group] = printable(name_of({"_target_": leaf}), LONGEST)
        elif not key.startswith("_") and not (isinstance(leaf, str) and run_dir in leaf) and leaf != {}:
            found[name] = value_of(leaf)
    found |= {name: printable(given[name], LONGEST) for name in TYPED if name in given}
    found[FOLD] = None if fold_of(record) is None else HELD_OUT  # runs of all folds are one row
    if record["corpus"]:
        found["data"] = printable(f"{record['corpus'].get('name')} {str(record['corpus'].get('sha256'))[:6]}", LONGEST)
    return {printable(name, LONGEST): value for name, value in found.items()}


def value_of(leaf: Any) -> Value:
    """Convert a setting to a value that can be compared, sorted and shown."""
    if leaf is None or isinstance(leaf, bool):
        return leaf
    if isinstance(leaf, int | float) and sane(leaf):
        return leaf
    return printable(leaf if isinstance(leaf, str) else json.dumps(leaf), LONGEST)


def parsed(word: str) -> Value:
    """Parse a value of a command line."""
    constants: dict[str, Value] = {"null": None, "true": True, "false": False}
    if word.lower() in constants:
        return constants[word.lower()]
    for number in (int, float):
        try:
            return value_of(number(word))
        except ValueError:
            continue
    return printable(word, LONGEST)


def shown(value: Value, digits: int = 6) -> str:
    """Format a value as one types it."""
    return f"{value:.{digits}g}" if isinstance(value, float) else typed(value)


def ordered(values: Iterable[Value]) -> list[Value]:
    """Sort numbers by size, then words."""

    def key(value: Value) -> tuple[bool, float, str]:
        number = is_number(value)
        return not number, float(value) if number else 0.0, str(value)  # type: ignore[arg-type]

    return sorted(values, key=key)


def is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sane(number: float) -> bool:
    """Return whether calculations with a number stay finite, also with its powers."""
    return abs(number) < 1e75 and math.isfinite(number)


def message_of(error: InputError | OSError) -> str:
    """Return an error as one line."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)

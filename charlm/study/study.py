"""Runs -> the swept settings, and a row for each combination, with mean and spread over seeds."""

import itertools
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from charlm.errors import InputError, printable
from charlm.meaning import meaning, references
from charlm.run.results import whole_results
from charlm.run.table import COLUMNS
from charlm.schema import SETS
from charlm.study.comparison import ALPHA, LEVEL, Comparison, System, against_best, over_folds, times_error
from charlm.study.notes import Note, notes
from charlm.study.runs import FAILED, LONGEST, STATES, Run, Value, ordered, read_runs, shown

CHOICES = {"model", "optimizer", "scheduler", "tokenizer", "logger", "data", "experiment", "callbacks"}


@dataclass(frozen=True)
class Row:
    """Finished runs that differ in their seed only, and perhaps in the document that they hold out.

    Args:
        settings: values of the swept settings, as far as the runs have them.
        runs: one for each seed, of each fold.
    """

    settings: dict[str, Value]
    runs: list[Run]

    @cached_property
    def folds(self) -> list[int]:
        """The documents that are held out, if they are several."""
        found = sorted({run.fold for run in self.runs if run.fold is not None})
        return found if len(found) > 1 else []

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

    def values(self, figure: str) -> list[float]:
        """The figure of each run or, where there are folds, its mean over the seeds of each."""
        there = [run for run in self.runs if figure in run.figures]
        of_folds = ([run.figures[figure] for run in there if run.fold == fold] for fold in self.folds)
        return [statistics.fmean(of_fold) for of_fold in of_folds if of_fold] or [run.figures[figure] for run in there]

    def mean(self, figure: str = "val/loss") -> float | None:
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def sd(self, figure: str = "val/loss") -> float | None:
        """The standard deviation over seeds or, where there are folds, over these; None for one."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def loss(self) -> float:
        return statistics.fmean(self.values("val/loss"))

    def system(self, name: str, paired: bool) -> System:
        """Return the row as `charlm.study.comparison` takes it.

        Args:
            paired: by blocks of val; False: with the whole as one block.
        """
        if self.folds:
            return over_folds(name, [run.seed or 0 for run in self.runs], self.folds, self.values("val/loss"))
        blocks = [run.blocks if paired else [(1.0, run.figures["val/loss"])] for run in self.runs]
        characters, nats = np.array(blocks).transpose(2, 0, 1)
        return System(name, tuple(run.seed or 0 for run in self.runs), nats, characters[0])

    def error(self, figure: str = "val/loss") -> float | None:
        """Return the number behind the ±: the standard error over folds; else the standard deviation over seeds or, for
        one seed, the standard error of the text.
        """
        sd = self.sd(figure)
        if self.folds and sd is not None:
            return sd / math.sqrt(len(self.values(figure)))
        return sd if len(self.runs) > 1 else self.mean(f"{figure}_se")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The loss of a document like those of the folds, on average: its interval at LEVEL."""
        error = self.error()
        if not self.folds or error is None:
            return None
        half = times_error(len(self.folds)) * error
        return self.loss - half, self.loss + half


@dataclass(frozen=True)
class Study:
    """Many runs, compared.

    Args:
        runs: all runs.
        swept: the names of the settings that differ, as they were given first, the seed not among them.
        labels: short names for them.
        rows: sorted by val loss, best first.
        unfinished: all others, those that want a decision first.
        notes: what to know before comparing, loud notes first.
        place: the folder that all are in, as the names of the runs begin.
    """

    runs: list[Run]
    swept: list[str]
    labels: dict[str, str]
    rows: list[Row]
    unfinished: list[Run]
    notes: list[Note]
    place: str = ""

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.unfinished if run.state in FAILED]

    @property
    def others(self) -> list[Run]:
        """Unfinished runs that did not fail."""
        return [run for run in self.unfinished if run.state not in FAILED]

    @cached_property
    def comparable(self) -> bool:
        """Return whether all rows were evaluated on the same characters, or on the same folds of them."""
        texts = {frozenset(run.measured_on for run in row.runs) for row in self.rows}
        return len(texts) == 1 and len({(*text, fold is None) for *text, fold in texts.pop()}) == 1

    @cached_property
    def folds(self) -> int:
        """The most documents that a row holds out, one in each run; 0 where the rows have one val text."""
        return max((len(row.folds) for row in self.rows), default=0)

    @property
    def over(self) -> str:
        """Say what rows are means over."""
        return "folds" if self.folds else "seeds"

    @property
    def same_text(self) -> str:
        """Return the title of `references`."""
        return f"On the same {self.folds} texts, on average" if self.folds else "On the same text"

    @property
    def bars(self) -> str:
        """Say what the ± of rows is."""
        return "standard error over folds" if self.folds else "standard deviation over seeds"

    @property
    def legend(self) -> str:
        """Explain the ± of the table."""
        plain = [row for row in self.rows if not row.folds]
        parts = []
        if self.folds:
            where = " of rows with folds" if plain else ""
            parts.append(
                f"±{where} is the standard error of the mean over folds, from the spread between their val texts; "
                f"{LEVEL:.0%} intervals are {times_error(self.folds):.2f} times as wide (t, {self.folds} folds)."
            )
        parts += ["± is the standard deviation over seeds."] if any(len(row.runs) > 1 for row in plain) else []
        one_seed = "±* is the standard error of the text, as there is one seed: of this val text, and of no other."
        parts += [one_seed] if any(len(row.runs) == 1 for row in plain) else []
        return " ".join(parts)

    @cached_property
    def formatted(self) -> dict[str, dict[Value, str]]:
        """The formatted values of each setting, with enough digits to distinguish them."""
        found = {}
        for name in self.swept:
            values = {run.settings[name] for run in self.runs if name in run.settings}
            tries = ({value: shown(value, digits) for value in values} for digits in (4, 6, 9, 17))
            found[name] = next((texts for texts in tries if len(set(texts.values())) == len(values)), {})
        return found

    def values(self, name: str) -> list[Value]:
        """Return the values of a setting in finished runs, sorted."""
        return ordered({row.settings[name] for row in self.rows if name in row.settings})

    def label(self, row: Row, names: Sequence[str] | None = None) -> str:
        """Format the settings of a row, or some of them: lr=0.01, block_size=8."""
        names = [name for name in (self.swept if names is None else names) if name in row.settings]
        return ", ".join(f"{self.labels[name]}={self.formatted[name][row.settings[name]]}" for name in names)

    def named(self, words: Sequence[str]) -> list[str]:
        """Return the swept settings with the given names or labels.

        Raises:
            InputError: if there is no such setting.
        """
        known = {label: name for name, label in self.labels.items()} | {name: name for name in self.swept}
        if unknown := [word for word in words if word not in known]:
            there = ", ".join(self.labels.values()) or "none"
            raise InputError(f"--columns {unknown[0]} is no setting in which these runs differ: {there}")
        return [known[word] for word in words]

    def near(self, run: Run) -> str:
        """Return the folder of a run relative to that of the study."""
        return run.name.removeprefix(self.place)

    def verdict(self, row: Row) -> str:
        """Compare a row with the best; see `criterion`."""
        if not self.comparable:
            return "not comparable"
        if lost := sum(run.lost for run in row.runs):
            return "above uniform" if lost == len(row.runs) else f"{lost} of {len(row.runs)} above uniform"
        if row is self.rows[0]:
            return "best"
        one = self.compared.get(id(row))
        return one.verdict if one else "worse"

    @cached_property
    def compared(self) -> dict[int, Comparison]:
        """How each row compares with the best, by the row's id; none of rows that are worse than guessing."""
        rows = [row for row in self.rows if not any(run.lost for run in row.runs)]
        if not self.comparable or not rows or rows[0] is not self.rows[0]:
            return {}
        found = against_best([row.system(self.label(row), self.paired) for row in rows])
        return {id(row): one for row, one in zip(rows[1:], found, strict=True)}

    @cached_property
    def paired(self) -> bool:
        """Whether all runs have the losses of the same blocks of val."""
        numbers = {len(run.blocks) for row in self.rows for run in row.runs}
        return len(numbers) == 1 and numbers.pop() > 1

    @cached_property
    def criterion(self) -> str:
        """Say what the verdicts mean."""
        lost = " Above uniform: worse than guessing among all characters." if self.has_lost else ""
        if not self.compared:
            return lost.strip()
        one = next(iter(self.compared.values()))
        if self.folds:
            return (
                f"Within noise: p >= {ALPHA} in a t test of the differences on the same val text, over "
                f"{self.folds} folds, corrected for all pairs of {len(self.compared) + 1} rows (Bonferroni), as the "
                f"best was chosen among them.{lost}"
            )
        text = "of the text, in pairs by blocks of val, and " if self.paired else ""
        return (
            f"Within noise: p >= {ALPHA} in a test that knows of the choice among {len(self.compared) + 1} rows; of "
            f"tables with equal rows, at most one in twenty calls any worse. The error is that {text}of the seed, with "
            f"a standard deviation of {one.seed_sd:.2g} nats {one.seed_sd_from}.{lost}"
        )

    @property
    def has_lost(self) -> bool:
        """Whether a run is worse than guessing."""
        return any(run.lost for row in self.rows for run in row.runs)

    def best_by_value(self, name: str) -> dict[Value, Row]:
        """The best row of each value of a setting."""
        return {v: next(row for row in self.rows if row.settings.get(name, row) == v) for v in self.values(name)}

    @cached_property
    def first(self) -> tuple[Run, dict[str, Any], Any] | None:
        """The first run of the best row, its config and its results; None if they cannot be read."""
        run = self.rows[0].runs[0] if self.rows else None
        results = whole_results(Path(run.folder)) if run and run.folder else None
        return (run, run.record["config"], results) if run and run.record and results else None

    @cached_property
    def meaning(self) -> list[str]:
        """Return what the loss of the best run means, in plain lines."""
        if not self.first or self.folds or self.verdict(self.rows[0]) != "best":
            return []
        run, config, results = self.first
        try:
            return [f"The best, {run.name}:", *meaning(results, config, Path(run.folder))]
        except (KeyError, TypeError, ValueError, ArithmeticError):  # figures of a stranger
            return []

    @cached_property
    def varied(self) -> list[str]:
        """Return settings with several finished values, the most influential first."""

        def effect(name: str) -> float:  # the range of what each value reaches at its best
            losses = [row.loss for row in self.best_by_value(name).values()]
            return max(losses) - min(losses)

        return sorted((name for name in self.swept if len(self.values(name)) > 1), key=effect, reverse=True)

    @cached_property
    def references(self) -> dict[str, float]:
        """Losses on the same text, or on average over the folds, without training, nats per character, by what reaches
        them.
        """
        if not self.first or not self.comparable:
            return {}
        _, config, results = self.first
        try:
            if not self.folds:
                return references(results, config)
            of_fold: dict[int | None, Any] = {run.fold: whole_results(Path(run.folder)) for run in self.rows[0].runs}
            each = [references(found, config) for found in of_fold.values()]
            return {name: statistics.fmean(one[name] for one in each) for name in each[0]}
        except (KeyError, TypeError, ValueError, ArithmeticError):  # figures of a stranger
            return {}

    def found(self) -> dict[str, Any]:
        """Return the study as plain types, for programs."""
        return {
            "notes": [note._asdict() for note in self.notes],
            "swept": self.swept,
            "references": self.references,
            "rows": [
                {
                    "settings": row.settings,
                    "seeds": [run.seed for run in row.runs],
                    **({"folds": [run.fold for run in row.runs]} if row.folds else {}),
                    "runs": [run.name for run in row.runs],
                    **{c.figure: {"mean": row.mean(c.figure), "sd": row.sd(c.figure)} for c in COLUMNS},
                    "val/loss_se": row.error() if row.folds else row.mean("val/loss_se"),
                    **({"val/loss_interval": row.interval} if row.folds else {}),
                    "verdict": self.verdict(row),
                    **(self.compared[id(row)].against() if id(row) in self.compared else {}),
                }
                for row in self.rows
            ],
            "unfinished": [
                {"run": run.name, "state": run.state, "reason": run.reason, "seed": run.seed, "last_val_loss": run.last}
                | ({"fold": run.fold} if run.fold is not None else {})
                | {"settings": {name: run.settings[name] for name in self.swept if name in run.settings}}
                for run in self.unfinished
            ],
        }


def read_study(places: Iterable[Path]) -> Study:
    """Compare the runs in folders, at any depth.

    Raises:
        InputError: if there is none that can be read.
    """
    places = list(places)
    runs, damaged = read_runs(places)
    if not runs:
        found = f"no run that can be read ({'; '.join(damaged[:3])})" if damaged else "no run"
        where = ", ".join(map(str, places))
        raise InputError(f"{where} holds {found}: give folders as python train.py makes them, such as outputs/SWEEP")
    return study_of(runs, damaged, printable(f"{places[0]}{os.sep}", LONGEST) if len(places) == 1 else "")


def study_of(runs: Sequence[Run], damaged: Sequence[str] = (), place: str = "") -> Study:
    """Compare runs: find the swept settings, and make one row of runs that differ only in their seed and their fold."""
    swept, follows = swept_in(runs)
    finished = [run for run in runs if run.loss is not None]
    groups: dict[tuple[Any, ...], dict[tuple[int, int], Run]] = {}
    for run in sorted(finished, key=lambda run: run.record["started"] if run.record else ""):
        key = tuple(run.settings.get(name, ...) for name in swept)  # a choice may not have it
        groups.setdefault(key, {})[run.fold or 0, run.seed or 0] = run  # a newer one in the place of an older
    rows = []
    for group in groups.values():
        first = next(iter(group.values())).settings
        settings = {name: first[name] for name in swept if name in first}
        rows.append(Row(settings, [group[place] for place in sorted(group)]))
    repeated = len(finished) - sum(len(row.runs) for row in rows)
    unfinished = [run for run in runs if run.loss is None]
    unfinished.sort(key=lambda run: (STATES.index(run.state), run.last if run.last is not None else math.inf))
    return Study(
        list(runs),
        swept,
        short(swept),
        sorted(rows, key=lambda row: row.loss),
        unfinished,
        notes([run for row in rows for run in row.runs], follows, repeated, damaged, [row.runs for row in rows]),
        place,
    )


def swept_in(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the settings that differ, and apart from them those that differ only because a choice set them. A setting
    that only some runs have, with one value, belongs to their choice. Jobs that have not started are ignored, because
    they do not record all settings.
    """
    begun = [run for run in runs if run.record] or runs
    values: dict[str, set[Value]] = {}
    for name, value in itertools.chain.from_iterable(run.settings.items() for run in begun):
        values.setdefault(name, set()).add(value)
    lacking = {name for name in values if any(name not in run.settings for run in begun)}
    parts = {name for name in values if name.partition(".")[0] in SETS and name.count(".") == 1}
    targets = parts | (CHOICES & values.keys())
    differ = {name for name, found in values.items() if len(found) > 1 or (name in lacking & targets)}
    differ -= {name for name in differ if all(name in run.follows for run in begun if name in run.settings)}
    given = {name for run in runs for name in run.given}
    follows: dict[str, list[str]] = {}
    for name in sorted(differ - given):
        for choice in sorted(differ & CHOICES & given):
            pairs = {(run.settings.get(choice), run.settings.get(name)) for run in begun}
            if len({chosen for chosen, _ in pairs}) == len(pairs):
                follows.setdefault(choice, []).append(name)
                break
    differ -= set(itertools.chain(*follows.values()))
    typed = list(dict.fromkeys(name for run in runs for name in [*run.given, *run.settings]))
    return [name for name in typed if name in differ], follows


def short(names: Sequence[str]) -> dict[str, str]:
    """Shorten names to their last part, where that is unique."""
    times = Counter(name.rpartition(".")[2] for name in names)
    return {name: last if times[last := name.rpartition(".")[2]] == 1 else name for name in names}

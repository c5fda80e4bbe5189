"""Runs -> the swept settings, and a row for each combination, with mean and spread over seeds."""

import itertools
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from charlm.errors import InputError, printable
from charlm.meaning import meaning
from charlm.run.results import whole_results
from charlm.run.table import COLUMNS
from charlm.study.notes import Note, notes
from charlm.study.runs import FAILED, LONGEST, STATES, Run, Value, ordered, read_runs, shown

CHOICES = {"model", "optimizer", "scheduler", "tokenizer", "logger", "data", "experiment", "callbacks"}
SIGNIFICANT = 0.05
CRITERION = (
    f"within noise of it, by a range test over the seeds of all rows and Welch's t-test of the two (p >= {SIGNIFICANT} "
    "in either; among equal rows, at most one table in twenty calls any worse); one seed cannot tell. Above uniform: "
    "worse than guessing among all characters."
)


@dataclass(frozen=True)
class Row:
    """Finished runs that differ in their seed only.

    Args:
        settings: values of the swept settings, as far as the runs have them.
        runs: one for each seed.
    """

    settings: dict[str, Value]
    runs: list[Run]

    def values(self, figure: str) -> list[float]:
        return [run.figures[figure] for run in self.runs if figure in run.figures]

    def mean(self, figure: str = "val/loss") -> float | None:
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def sd(self, figure: str = "val/loss") -> float | None:
        """The standard deviation over seeds, None for one."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def loss(self) -> float:
        return statistics.fmean(self.values("val/loss"))

    @property
    def error(self) -> float | None:
        """Return the number behind the ±: the standard deviation over seeds or, for one seed, the standard error."""
        return self.sd() if len(self.runs) > 1 else self.mean("val/loss_se")


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
        """Return whether all runs were evaluated on the same characters."""
        return len({run.measured_on for row in self.rows for run in row.runs}) == 1

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

    def near(self, run: Run) -> str:
        """Return the folder of a run relative to that of the study."""
        return run.name.removeprefix(self.place)

    def verdict(self, row: Row) -> str:
        """Compare a row with the best, by CRITERION."""
        if not self.comparable:
            return "not comparable"
        if lost := sum(run.lost for run in row.runs):
            return "above uniform" if lost == len(row.runs) else f"{lost} of {len(row.runs)} above uniform"
        if row is self.rows[0]:
            return "best"
        worse = self.worse.get(id(row))
        return "one seed" if worse is None else "worse" if worse else "within noise"

    @cached_property
    def worse(self) -> dict[int, bool]:
        """Whether each row with several seeds is worse than the best, by the row's id.

        The range test accounts for the number of rows and for the choice of the best among them, which a t-test against
        the best does not; it assumes equal variances, and the t-test does not. A row is worse only if both say so.
        """
        rows = [row for row in self.rows if len(row.runs) > 1 and not any(run.lost for run in row.runs)]
        if not rows or rows[0] is not self.rows[0]:
            return {}
        groups = [row.values("val/loss") for row in rows]
        differs = zip(rows, groups, range_test(groups), strict=True)
        return {id(row): far and (welch(groups[0], group) or 0) < SIGNIFICANT for row, group, far in differs}

    def best_by_value(self, name: str) -> dict[Value, Row]:
        """The best row of each value of a setting."""
        return {v: next(row for row in self.rows if row.settings.get(name, row) == v) for v in self.values(name)}

    @cached_property
    def meaning(self) -> list[str]:
        """Return what the loss of the best run means, in plain lines."""
        run = self.rows[0].runs[0] if self.rows else None
        results: Any = whole_results(Path(run.folder)) if run and run.folder else None
        if not run or not run.record or not results or self.verdict(self.rows[0]) != "best":
            return []
        try:
            return [f"The best, {run.name}:", *meaning(results, run.record["config"], Path(run.folder))]
        except (KeyError, TypeError, ValueError, ArithmeticError):  # figures of a stranger
            return []

    @cached_property
    def varied(self) -> list[str]:
        """Return settings with several finished values, the most influential first."""

        def effect(name: str) -> float:  # the range of what each value reaches at its best
            losses = [row.loss for row in self.best_by_value(name).values()]
            return max(losses) - min(losses)

        return sorted((name for name in self.swept if len(self.values(name)) > 1), key=effect, reverse=True)

    def found(self) -> dict[str, Any]:
        """Return the study as plain types, for programs."""
        return {
            "notes": [note._asdict() for note in self.notes],
            "swept": self.swept,
            "rows": [
                {
                    "settings": row.settings,
                    "seeds": [run.seed for run in row.runs],
                    "runs": [run.name for run in row.runs],
                    **{c.figure: {"mean": row.mean(c.figure), "sd": row.sd(c.figure)} for c in COLUMNS},
                    "val/loss_se": row.mean("val/loss_se"),
                    "verdict": self.verdict(row),
                }
                for row in self.rows
            ],
            "unfinished": [
                {"run": run.name, "state": run.state, "reason": run.reason, "seed": run.seed, "last_val_loss": run.last}
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
    """Compare runs: find the swept settings, and make one row of runs that differ only in their seed."""
    swept, follows = swept_in(runs)
    finished = [run for run in runs if run.loss is not None]
    groups: dict[tuple[Any, ...], dict[int | None, Run]] = {}
    for run in sorted(finished, key=lambda run: run.record["started"] if run.record else ""):
        key = tuple(run.settings.get(name, ...) for name in swept)  # a choice may not have it
        groups.setdefault(key, {})[run.seed] = run  # a newer one in the place of an older
    rows = []
    for group in groups.values():
        first = next(iter(group.values())).settings
        settings = {name: first[name] for name in swept if name in first}
        rows.append(Row(settings, sorted(group.values(), key=lambda run: run.seed or 0)))
    repeated = len(finished) - sum(len(row.runs) for row in rows)
    unfinished = [run for run in runs if run.loss is None]
    unfinished.sort(key=lambda run: (STATES.index(run.state), run.last if run.last is not None else math.inf))
    return Study(
        list(runs),
        swept,
        short(swept),
        sorted(rows, key=lambda row: row.loss),
        unfinished,
        notes([run for row in rows for run in row.runs], follows, repeated, damaged),
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
    targets = {name for name in values if name in CHOICES or (name.startswith("callbacks.") and name.count(".") == 1)}
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


def welch(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the two-sided p value of equal means where variances may differ (Welch 1947).

    None with fewer than two values each.
    """
    from scipy import stats  # here, because it takes a second to import

    if min(len(one), len(other)) < 2:
        return None
    if len({*one}) == len({*other}) == 1:  # no variance: the test divides by it
        return float(one[0] == other[0])
    return float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def range_test(groups: Sequence[Sequence[float]]) -> list[bool]:
    """Return whether each group's mean differs from that of the first, by a robust form of Tukey's range test.

    Tukey (1949), with Kramer's (1956) correction for groups of different sizes, pools the variances of all groups. Here
    the pooled variance is their median, so that a few groups with a large spread, such as those of a learning rate that
    is too high, do not hide differences among the others; half of the degrees of freedom pay for that. In simulations
    any of 2 to 20 equal groups differs in fewer than one case of twenty. Each group has at least two values.
    """
    if len(groups) < 2:
        return [False] * len(groups)
    sizes, variances = [len(group) for group in groups], [statistics.variance(group) for group in groups]
    free = sum(sizes) - len(groups)  # degrees of freedom
    if len(groups) == 2:
        variance = sum(v * (n - 1) for v, n in zip(variances, sizes, strict=True)) / free
    else:
        variance = statistics.median(v / median_of_variance(n) for v, n in zip(variances, sizes, strict=True))
        free = max(1, free // 2)
    found = []
    for group in groups:
        error = math.sqrt(variance / 2 * (1 / len(group) + 1 / sizes[0]))
        apart = abs(statistics.fmean(group) - statistics.fmean(groups[0]))
        found.append(apart > range_point(len(groups), free) * error if error else apart > 0)
    return found


@cache
def range_point(groups: int, free: int) -> float:
    """Return the upper point of the studentized range, for SIGNIFICANT and `free` degrees of freedom."""
    from scipy import stats  # here, because it takes a second to import

    return float(stats.studentized_range.isf(SIGNIFICANT, groups, free))


@cache
def median_of_variance(n: int) -> float:
    """Return the median of the sample variance of n normal values, whose variance is 1."""
    from scipy import stats

    return float(stats.chi2.median(n - 1) / (n - 1))

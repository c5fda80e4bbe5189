"""Notes for comparing runs: what ended them, how much data they saw, and how they differ."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from charlm.errors import printable
from charlm.run.record import flat
from charlm.study.runs import FOLD, Run, ordered, shown

ALIKE = 1.02  # ratio of tokens that still counts as equal: the last step may exceed the limit
MOST_DAMAGED = 10  # that are named
MOST_NAMED = 12  # documents
# Limits of a run, and the setting of each.
LIMITS = {
    "steps": "trainer.max_steps",
    "tokens": "max_tokens",
    "time": "trainer.max_time",
    "epochs": "trainer.max_epochs",
}
LIMITS |= {"early stopping": ""}


class Note(NamedTuple):
    """One line; `loud` if nobody should compare the losses without reading it."""

    text: str
    loud: bool = False


def notes(
    runs: list[Run],
    follows: dict[str, list[str]],
    repeated: int = 0,
    damaged: Sequence[str] = (),
    rows: Sequence[Sequence[Run]] = (),
) -> list[Note]:
    """Return all notes, loud ones first.

    Args:
        runs: the compared runs.
        follows: settings that differ only because a choice set them, by that choice.
        repeated: number of runs that a newer run with the same settings and seed replaces.
        damaged: a line for each folder that could not be read.
        rows: the same runs, by their rows.
    """
    found = [*texts(runs), *folds(rows), *windows(runs), *budget(runs), *environment(runs), *certificates(runs)]
    found += [Note(f"with {choice} also differ: {', '.join(names)}") for choice, names in follows.items()]
    if repeated:
        count = "a run repeats" if repeated == 1 else f"{repeated} runs repeat"
        found.append(Note(f"{count} the settings and the seed of a newer one, which counts instead"))
    found += [Note(f"left out: {line}") for line in damaged[:MOST_DAMAGED]]
    if len(damaged) > MOST_DAMAGED:
        found.append(Note(f"left out: {len(damaged) - MOST_DAMAGED} more folders that cannot be read"))
    return sorted((Note(printable(text, 500), loud) for text, loud in found), key=lambda note: not note.loud)


def certificates(runs: list[Run]) -> Iterator[Note]:
    """Which checks of `charlm evaluate --certify` the runs passed."""
    certified = [run.certified for run in runs if run.certified]
    if certified:
        checks = dict.fromkeys(check for checks in certified for check in checks.split("; "))
        passed = [check for check in checks if all(check in one.split("; ") for one in certified)]
        which = "certified" if len(certified) == len(runs) else f"{len(certified)} of {len(runs)} runs are certified"
        yield Note(f"{which}: {', '.join(passed)}")


def texts(runs: list[Run]) -> Iterator[Note]:
    """Losses of different texts or splits do not compare."""
    corpora = Counter(map(corpus, runs))
    if len(corpora) > 1:
        yield Note(f"NOT comparable: these losses are of {len(corpora)} different texts: {listed(corpora)}", True)
    for name in ("val_fraction", "test_fraction"):
        parts = Counter(shown(run.settings.get(f"data.{name}")) for run in runs)
        if len(parts) > 1:
            yield Note(f"NOT comparable: the val split is not the same: data.{name} is {listed(parts)}", True)


def folds(rows: Sequence[Sequence[Run]]) -> Iterator[Note]:
    """Rows whose runs hold out documents are means over these, and compare if they hold out the same ones."""
    each = [sorted({run.fold for run in row if run.fold is not None}) for row in rows]
    there = sorted({*chain(*each)})
    if len({run.settings.get(FOLD) for row in rows for run in row}) > 1:
        plain = sum(not numbers for numbers in each)
        yield Note(
            f"NOT comparable: {plain} of {len(rows)} rows have the end of the text as val, and the others hold out "
            f"documents ({FOLD}={series(there)})",
            True,
        )
    if lacking := [row for row in each if row and row != there]:
        yield Note(
            f"NOT comparable: of {FOLD}={series(there)}, {len(lacking)} of {len(rows)} rows have only some, such as "
            f"{series(lacking[0])}: finish the others, resume=SWEEP",
            True,
        )
    if len(there) == 1:
        yield Note(f"val is a document that is held out, {FOLD}={there[0]}: {name_of_fold(rows, there[0])}")
    elif there:
        names = ", ".join(name_of_fold(rows, fold) for fold in there[:MOST_NAMED])
        more = f" and {len(there) - MOST_NAMED} more" if len(there) > MOST_NAMED else ""
        yield Note(
            f"each loss is a mean over {len(there)} documents that were held out in turn, each the val text of its own "
            f"runs, {FOLD}={series(there)}: {names}{more}. Its error is that over documents; differences are taken on "
            f"the same document"
        )


def name_of_fold(rows: Sequence[Sequence[Run]], fold: int) -> str:
    corpora = (run.record["corpus"] or {} for row in rows for run in row if run.fold == fold and run.record)
    return str(next(corpora, {}).get("held_out", "?"))


def series(numbers: Sequence[int]) -> str:
    """Format ascending numbers: 1 to 9, or 1, 2, 5."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def corpus(run: Run) -> str:
    found = (run.record and run.record["corpus"]) or {}
    return f"{found.get('name')} (sha256 {str(found.get('sha256'))[:6]}...)"


def windows(runs: list[Run]) -> Iterator[Note]:
    """Longer contexts make characters easier to predict."""
    sizes = ordered({run.settings.get("data.block_size") for run in runs})
    contexts = ordered({int(run.figures.get("min_context", 1)) for run in runs})
    if len(contexts) > 1:
        least = ", ".join(map(shown, contexts))
        yield Note(f"NOT comparable: characters are predicted after at least data.min_context={least} others", True)
    elif contexts and contexts[0] != 1:
        yield Note(f"every character is predicted after at least {contexts[0]} others, whatever the block size")
    elif len(sizes) > 1:
        yield Note(
            f"block sizes differ ({', '.join(map(shown, sizes))}) with data.min_context=1: that the windows are longer "
            "can alone make 0.16 nats; set data.min_context to half the smallest",
            True,
        )


def budget(runs: list[Run]) -> Iterator[Note]:
    """Runs that saw more text have lower losses for that reason alone."""
    runs = [run for run in runs if run.figures.get("steps") != 0]  # what is only counted has no budget
    ends = Counter(run.stopped_by if run.stopped_by in LIMITS else "an unknown limit" for run in runs)
    if len(runs) < 2:
        return
    end = next(iter(ends))
    tokens = [run.figures[name] for run in runs if (name := "train/tokens") in run.figures]
    steps = {int(run.figures.get("steps", 0)) for run in runs}
    limits = Counter(shown(run.settings.get(LIMITS.get(end, ""))) for run in runs)
    saw, alike = f"saw {span(tokens)} tokens", bool(tokens) and max(tokens) <= ALIKE * min(tokens)
    compares = (
        "" if alike else f", so this also compares data seen: max_tokens={min(tokens, default=0):.0f} matches them"
    )
    if len(ends) > 1:
        yield Note(f"ended differently, by {listed(ends)}; they {saw}{compares}", not alike)
    elif end in ("tokens", "time") and len(limits) == 1:
        yield Note(f"matched by {end}: {LIMITS[end]}={next(iter(limits))} ended each, and they {saw}")
    elif end == "steps" and len(steps) == 1:
        also = " and by tokens" if alike else ""
        yield Note(f"matched by steps{also}: each made {span(steps)}, and they {saw}{compares}", not alike)
    else:
        yield Note(f"ended by {end}, after {span(steps)} steps; they {saw}{compares}", not alike)


def environment(runs: list[Run]) -> Iterator[Note]:
    """Versions, hardware and git commit that a run depends on."""
    environments = [flat(run.record["environment"]) for run in runs if run.record]
    commits = Counter(str(seen.get("git.commit") or "unknown")[:7] for seen in environments)
    if len(commits) > 1:
        yield Note(f"made by different code: commits {listed(commits)}")
    if dirty := sum(seen.get("git.dirty") is True for seen in environments):
        yield Note(f"{dirty} of {len(environments)} runs were made by code with changes that are in no commit")
    versions = {name: Counter(str(seen.get(name)) for seen in environments) for name in sorted({*chain(*environments)})}
    other = {n: found for n, found in versions.items() if len(found) > 1 and n.startswith(("packages.", "python"))}
    if other:
        listing = "; ".join(f"{name.removeprefix('packages.')} {listed(found)}" for name, found in other.items())
        yield Note(f"versions differ: {listing}")
    devices = Counter(str(seen.get("cpu" if seen.get("device") == "cpu" else "device")) for seen in environments)
    if len(devices) > 1:
        yield Note(f"made on different devices, so that seconds cannot be compared: {listed(devices)}")


def listed(found: Counter[str], most: int = 4) -> str:
    """List values with their counts: cpu (3 runs), NVIDIA H200 (1)."""
    parts = [
        f"{what} ({n}{' run' + 's' * (n > 1) if k == 0 else ''})" for k, (what, n) in enumerate(found.most_common(most))
    ]
    return ", ".join(parts) + (f" and {len(found) - most} more" if len(found) > most else "")


def span(numbers: Iterable[Any]) -> str:
    """Format the smallest and the largest number, or one number if both are equal."""
    least, most = min(numbers, default=0), max(numbers, default=0)
    return f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"

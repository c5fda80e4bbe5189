"""May runs enter the table of records? The rules of docs/records.md as checks, and the runs' row of the table."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from charlm import checkpoint
from charlm.budget import tokens_of_step
from charlm.certify import certify
from charlm.data import CharDataModule
from charlm.data.corpora import SHAKESPEARE_SHA256, load_corpus
from charlm.data.datamodule import VAL_FRACTION
from charlm.errors import InputError
from charlm.evaluate import Blocks, evaluate
from charlm.files import plain
from charlm.home import CONF
from charlm.model import device_of
from charlm.run.overrides import typed
from charlm.run.record import RUN_JSON, flat
from charlm.run.reproduce import reproduce
from charlm.run.results import whole_results
from charlm.run.trust import check_run, foreign
from charlm.study.comparison import Comparison, System, compare
from charlm.study.notes import ALIKE
from charlm.study.runs import Run, read_runs
from charlm.study.study import swept_in
from charlm.study.systems import data_of, system_of

FEWEST_SEEDS = 3
LEVEL = 0.01  # a record has a p value below it
TOLERANCE = 5e-5  # relative, between results.json and what is computed again, perhaps on another device
# Settings of the data that a submission may not change. The splits themselves are compared with the text, too.
STANDARD = {"val_fraction": VAL_FRACTION, "test_fraction": 0.0, "min_context": 1}
ON_VAL = {"Best": "callbacks=best", "EarlyStopping": "callbacks=early_stopping"}  # observers that choose on val
LIMITS = {"trainer.max_time", "trainer.max_steps", "max_tokens", "threads", "experiment"}  # in which a twin may differ
COLUMNS = ("date", "val loss", "seeds", "windows", "parameters", "tokens", "seconds", "commit", "idea")

Tracked = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


class BudgetClass(NamedTuple):
    """A class of the table: an upper limit on what each run may take.

    Args:
        seconds: that a run takes from its start to its end; with `training_only`, that its training takes.
        cores: of the CPU, where a run has no GPU; None: a run has one GPU.
        parameters: that the model has.
        tokens: that it was trained on.
    """

    title: str
    seconds: float | None = None
    cores: int | None = None
    training_only: bool = False
    parameters: int | None = None
    tokens: int | None = None


BUDGETS = {
    "cpu_90s": BudgetClass("90 seconds on 2 CPU cores", 90, 2),
    "cpu_10min": BudgetClass("10 minutes on 2 CPU cores", 600, 2),
    "gpu_1min": BudgetClass("one GPU minute", 60, training_only=True),
    "gpu_nanogpt": BudgetClass("nanoGPT's GPU budget", parameters=10_745_088, tokens=5_000 * 64 * 256),
}


@dataclass(frozen=True)
class Measured:
    """A run whose loss was computed again.

    Args:
        blocks: characters and nats of each block of val, (n,) each.
        failures: a line for each way in which the run is not what it claims.
    """

    parameters: int = 0
    block_size: int = 0
    blocks: tuple[Tensor, Tensor] | None = None
    failures: tuple[str, ...] = ()


@dataclass
class Submission:
    """The outcome: refused if there are failures, one line for each rule that was broken.

    Args:
        row: of the table of records, by COLUMNS; None: the runs have no loss.
        against: the comparison with the runs of the present record, if these were given.
        reproduced: the run that was trained again and is the same to the bit.
    """

    failures: list[str] = field(default_factory=list)
    row: dict[str, str] | None = None
    against: Comparison | None = None
    reproduced: str | None = None

    def found(self) -> dict[str, Any]:
        """Return the outcome as plain types, for programs."""
        against = self.against and self.against.found()
        return {
            "accepted": not self.failures,
            "failures": self.failures,
            "row": self.row,
            "against": against,
            "reproduced": self.reproduced,
        }

    def lines(self) -> list[str]:
        """Return the outcome for people: reasons of a refusal, or the row in Markdown and what is known of it."""
        if self.failures or not self.row:
            return [f"refused: {line}" for line in self.failures]
        known = f"{self.reproduced} was trained again: the same to the bit" if self.reproduced else "not reproduced"
        if self.against:
            verdict = f"a record: {self.against.text('this')}"
        else:
            verdict = "not compared: train the present record's recipe here, and give its runs with --against FOLDER"
        table = [COLUMNS, ["---"] * len(COLUMNS), [self.row[name] for name in COLUMNS]]
        return [*(f"| {' | '.join(cells)} |" for cells in table), "", f"keeps the rules; {known}", verdict]


def submit(
    places: Sequence[Path],
    budget: BudgetClass,
    against: Path | None,
    twin: Path | None,
    reproduces: bool,
    device: str,
    tracked: Tracked,
) -> Submission:
    """Check runs against the rules of docs/records.md.

    Args:
        places: folders of the runs of one configuration, or of a sweep over seeds.
        against: folder with the runs of the present record.
        twin: a token-matched run of the same configuration, if the clock ended the runs.
        reproduces: whether to train one of the runs again.
        tracked: shows the progress of what it is given the title of.

    Raises:
        InputError: if a folder holds no run.
    """
    runs, damaged = runs_in(places)
    twins = runs_in([twin])[0] if twin else []
    records, damaged_records = runs_in([against]) if against else ([], [])
    records = [run for run in records if run.loss is not None]
    failures = [*damaged, *damaged_records, *broken_rules(runs, twins, budget)]
    failures += records_rules(runs, records, budget) if against else []
    measured, others, several = (
        {run.folder: measure(run, device, tracked) for run in group if run.state == "finished"}
        for group in (runs, twins, records)
    )
    failures += [line for group in (measured, others, several) for one in group.values() for line in one.failures]
    mine, record = (system(name, of, by) for name, of, by in (("this", runs, measured), ("record", records, several)))
    if budget.parameters and any(one.parameters > budget.parameters for one in measured.values()):
        failures.append(f"the model has more than {budget.parameters:,} parameters, the limit for {budget.title}")
    found = Submission(list(dict.fromkeys(failures)))
    if found.failures:
        return found
    assert mine
    found.row = row_of(runs, measured, mine)
    matched = system("twin", twins, others)
    if matched and compare([mine, matched])[0].verdict == "worse":
        found.failures.append(f"the twin ends at {matched.loss:.4f}, which is worse than the runs at {mine.loss:.4f}")
    if record:
        [found.against] = [one] = compare([record, mine])
        if one.p >= LEVEL or one.difference > 0:
            found.failures.append(
                f"no record: {one.difference:+.4f} ± {one.se:.4f} against {against} at {record.loss:.4f} "
                f"(p = {one.p:.2g}); a record is lower with p < {LEVEL}"
            )
    if reproduces and not found.failures:
        again = twins[0] if twins else min(runs, key=lambda run: run.figures["val/loss"])  # of the runs, the best
        if failure := not_reproduced(again, tracked):
            found.failures.append(failure)
        else:
            found.reproduced = again.name
    return found


def runs_in(places: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return all runs below folders, and a line for each that cannot be read.

    Raises:
        InputError: if there is none.
    """
    runs, damaged = read_runs(places)
    if not runs:
        raise InputError(f"{', '.join(map(str, places))}: no run there{': ' + damaged[0] if damaged else ''}")
    return runs, damaged


def broken_rules(runs: Sequence[Run], twins: Sequence[Run], budget: BudgetClass) -> Iterator[str]:
    """Yield a line for each rule that runs break by their records; their weights are for `measure`."""
    for run in [*runs, *twins]:
        if run.state != "finished":
            yield f"{run.name} has not finished: {run.state}{', ' + run.reason if run.reason else ''}"
        elif run.loss is None:
            yield f"{run.name} has no final figure: {run.reason}"
        if run.record:  # a job of a sweep that has not begun has none
            yield from settings_rules(run)
    if differing := swept_in(runs)[0]:
        yield f"the runs differ in {', '.join(differing)}: a record is one configuration"
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        yield f"{len(seeds)} runs have {len(set(seeds))} different seeds: give one run for each seed"
    if len(set(seeds)) < FEWEST_SEEDS:
        yield f"{len(set(seeds))} seed{'s' * (len(set(seeds)) > 1)}: a record needs at least {FEWEST_SEEDS}"
    if len({commit(run) for run in runs}) > 1:
        yield "the runs were made by different commits"
    for run in runs:
        if run.record:
            yield from budget_rules(run, budget)
    timed = [run for run in runs if run.stopped_by == "time"]
    if timed and not twins:
        tokens = max(int(run.figures.get("train/tokens", 0)) for run in timed)
        yield (
            "the clock ended the runs, which nobody can reproduce: train one more with trainer.max_time=null "
            f"max_tokens={tokens} threads=1, and give it with --twin"
        )
    if twins:
        yield from twin_rules(runs, twins)


def settings_rules(run: Run) -> Iterator[str]:
    """Yield a line for each rule that the settings and the code of a run break."""
    assert run.record
    config, environment = run.record["config"], run.record["environment"]
    if packages := foreign(config):
        yield f"parts come from outside of charlm: {', '.join(packages)}; a record's code is in its commit"
        return
    try:
        check_run(Path(run.folder, RUN_JSON), config, [CONF])
    except InputError as error:
        yield str(error)
        return
    for name, (there, value) in unusual(config).items():
        yield f"data.{name} is {typed(there)}, and records have {typed(value)}"
    for part in (config.get("callbacks") or {}).values():
        if choice := ON_VAL.get(str(part.get("_target_")).rpartition(".")[2]):
            yield f"{choice} chooses by the loss on val: choose on a part of train"
    if config.get("init_from") or environment.get("initial_weights"):
        yield f"init_from={config.get('init_from')}: a record begins from random weights"
    git = environment.get("git")
    if not isinstance(git, dict):
        yield "the commit is not known: train from a clone of the repository"
    elif git.get("dirty"):
        yield f"the code had changes that are not in commit {str(git.get('commit'))[:7]}: commit them, and train again"
    if run.record["earlier"]:
        yield f"{run.name} was stopped and resumed: its time from start to end is not known"


def unusual(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of the data that are not STANDARD: name -> (as it is, as it must be)."""
    pairs = {name: (config["data"].get(name), value) for name, value in STANDARD.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def budget_rules(run: Run, budget: BudgetClass) -> Iterator[str]:
    """Yield a line for each limit of a budget that a run exceeds."""
    assert run.record
    environment = run.record["environment"]
    on_cpu = environment.get("device") == "cpu"
    processes, threads = environment.get("processes"), environment.get("threads")
    if not isinstance(processes, int) or not isinstance(threads, int):
        yield f"{run.name} does not record how many processes and threads it had"
        return
    if on_cpu != bool(budget.cores) or (not on_cpu and processes > 1):
        wanted = f"{budget.cores} CPU cores" if budget.cores else "one GPU"
        yield f"trained on {processes} x {environment.get('device')}, and {budget.title} means {wanted}"
    elif budget.cores and threads * processes > budget.cores:
        yield f"{threads * processes} threads, and {budget.title} allows {budget.cores}"
    taken = run.figures.get("train/seconds", 0.0) if budget.training_only else seconds(run)
    if budget.seconds and taken > budget.seconds:
        what = "of training" if budget.training_only else "from start to end"
        yield f"{run.name} took {taken:.0f} seconds {what}: the limit is {budget.seconds:.0f}"
    if budget.tokens and run.figures.get("train/tokens", 0) > budget.tokens:
        yield f"{run.name} trained on {run.figures['train/tokens']:,.0f} tokens: the limit is {budget.tokens:,}"


def twin_rules(runs: Sequence[Run], twins: Sequence[Run]) -> Iterator[str]:
    """Yield a line for each way in which a run is no token-matched twin."""
    if len(twins) > 1:
        yield f"--twin holds {len(twins)} runs: give one"
    if differing := [name for name in swept_in([*runs, twins[0]])[0] if name not in LIMITS]:
        yield f"the twin differs in {', '.join(differing)}"
    if twins[0].stopped_by == "time":
        yield "the clock ended the twin as well: train it with trainer.max_time=null and max_tokens"
    most, taken = (max(run.figures.get("train/tokens", 0) for run in group) for group in (runs, twins))
    if taken > ALIKE * most:
        yield f"the twin trained on {taken:,.0f} tokens, and the runs on {most:,.0f} at most"


def records_rules(runs: Sequence[Run], records: Sequence[Run], budget: BudgetClass) -> Iterator[str]:
    """Yield a line for each reason why the runs of the present record do not serve for a comparison."""
    if len({run.seed for run in records}) < FEWEST_SEEDS:
        yield f"--against holds finished runs of fewer than {FEWEST_SEEDS} seeds"
    if differing := swept_in(records)[0]:
        yield f"--against holds runs that differ in {', '.join(differing)}"
    machines = {str(run.record["environment"].get("cpu")) for run in (*runs, *records) if run.record}
    if budget.seconds and budget.cores and len(machines) > 1:
        yield f"seconds of other machines do not compare: train the record's recipe here ({'; '.join(machines)})"


def measure(run: Run, device: str, tracked: Tracked) -> Measured:
    """Compute the loss of a run from its checkpoint, over all of val, and certify its model."""
    try:
        loaded = checkpoint.load(run.folder, device)
        data = data_of(loaded, Path(run.folder))
    except InputError as error:
        return Measured(failures=(str(error),))
    assert run.record
    failures = []
    if flat(loaded.config) != flat(run.record["config"]):
        failures.append(f"{run.name}: run.json and the checkpoint record other settings")
    if loaded.step != run.figures.get("steps"):
        failures.append(f"{run.name}: the checkpoint is of step {loaded.step:,}, and results.json of another")
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    if loaded.corpus["sha256"] != SHAKESPEARE_SHA256:
        name = loaded.corpus["name"]
        return Measured(failures=(*failures, f"trained on {name}: the table is about Tiny Shakespeare"))
    if not unusual(loaded.config) and not standard(data):
        failures.append("the splits are not the first 90% of the text for train, and the rest for val")
    blocks = Blocks(data.splits["val"], data.sizes)
    with tracked(f"evaluating {run.name}") as report:
        score = evaluate(loaded.model, data.windows("val", device_of(loaded.model)), report, blocks)
    processes = run.record["environment"].get("processes")
    tokens = loaded.step * tokens_of_step(loaded.config, processes) if isinstance(processes, int) else None
    claimed: Any = whole_results(Path(run.folder)) or {}
    for name, value in plain(score.figures("val") | {"parameters": parameters, "train/tokens": tokens}).items():
        if not agrees(claimed.get(name), value):
            failures.append(f"{run.name}: results.json has {name}={claimed.get(name)}, and its checkpoint has {value}")
    failures += [f"{run.name}: {one.name}: {one.failure}" for one in certify(loaded.model, data) if one.failure]
    return Measured(parameters, data.block_size, blocks.summed(), tuple(failures))


def agrees(claimed: Any, value: float | None) -> bool:
    """Return whether a figure of results.json, where None stands for NaN and nothing is trusted, is `value`."""
    if value is None or not isinstance(claimed, int | float):
        return claimed is value
    return math.isclose(claimed, value, rel_tol=TOLERANCE)


def standard(data: CharDataModule) -> bool:
    """Return whether train is the first 90% of Tiny Shakespeare, and val the rest, whatever the settings are called."""
    text = load_corpus("tinyshakespeare").text
    cut = int((1 - VAL_FRACTION) * len(text))
    parts = {name: data.tokenizer.decode(ids) for name, ids in data.splits.items()}
    return parts == {"train": text[:cut], "val": text[cut:]}


def system(name: str, runs: Sequence[Run], measured: dict[str, Measured]) -> System | None:
    """Return runs as `charlm.study.comparison` takes them; None if some have no loss."""
    found = [blocks for run in runs if (one := measured.get(run.folder)) and (blocks := one.blocks)]
    if not found or len(found) < len(runs) or len({len(characters) for characters, _ in found}) > 1:
        return None
    return system_of(name, [run.seed or 0 for run in runs], [None] * len(runs), found)


def row_of(runs: Sequence[Run], measured: dict[str, Measured], mine: System) -> dict[str, str]:
    """Return the row of the table of records, by COLUMNS."""
    first = measured[runs[0].folder]
    spread = f" ± {mine.losses.std(ddof=1):.4f}" if len(runs) > 1 else ""
    tokens = statistics.fmean(run.figures.get("train/tokens", 0) for run in runs)
    record = runs[0].record
    assert record
    return {
        "date": record["started"][:10],
        "val loss": f"{mine.loss:.4f}{spread}",
        "seeds": str(len(runs)),
        "windows": str(first.block_size),
        "parameters": f"{first.parameters / 1e6:.2f} M",
        "tokens": f"{tokens / 1e6:.1f} M",
        "seconds": f"{statistics.fmean(map(seconds, runs)):.0f}",
        "commit": (commit(runs[0]) or "unknown")[:7],
        "idea": "...",
    }


def commit(run: Run) -> str | None:
    """Return the commit that a run was made by, if it is known."""
    git = run.record and run.record["environment"].get("git")
    return str(git.get("commit")) if isinstance(git, dict) else None


def seconds(run: Run) -> float:
    """Return how long a run took from its start to its end, by run.json; infinity if that has no such times."""
    assert run.record
    try:
        return (
            datetime.fromisoformat(run.record["heartbeat"]) - datetime.fromisoformat(run.record["started"])
        ).total_seconds()
    except (ValueError, TypeError):
        return math.inf


def not_reproduced(run: Run, tracked: Tracked) -> str | None:
    """Train a run again, and return how it differs; None if it is the same to the bit."""
    try:
        with tracked(f"training {run.name} again") as report:
            found = reproduce(Path(run.folder), report)
    except InputError as error:
        return f"{run.name} is not reproduced: {error}"
    if found["equal"]:
        return None
    step = found["first_step"]
    how = f"losses differ from step {step:,} on" if step else f"{', '.join(found['differs'][:3])} differs"
    other = f"; {', '.join(found['environment'])} differs from then" if found["environment"] else ""
    return f"{run.name} is not reproduced bit for bit: {how}{other}"

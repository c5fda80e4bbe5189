"""A search: Optuna suggests trials one by one from the results so far, and prunes those that fall behind.

Each trial is an ordinary job. Optuna stores its trials in optuna.journal, in the folder of the
sweep. A suggestion is a function of the seed, of the trial's number and of what is known: with one worker, a search
repeats itself to the bit, however often it is killed on its way.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from charlm.errors import Diverged, InputError
from charlm.files import read_regular
from charlm.internals.optuna import reopen
from charlm.run.folder import held
from charlm.run.results import read_validations, whole_results
from charlm.run.table import outcome, short
from charlm.seeds import derive_seed
from charlm.sweep import ledger
from charlm.sweep.engine import Handed
from charlm.sweep.job import Job, Running
from charlm.sweep.ledger import Ledger
from charlm.sweep.names import label
from charlm.sweep.pool import STOPPED
from charlm.sweep.space import Space

JOURNAL = "optuna.journal"
JOB = "job"  # the attribute of a trial that names its folder
LARGEST_JOURNAL = 2**28  # bytes of a journal that is read
STATES: dict[TrialState, ledger.State] = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
}  # and what the ledger says of it


@dataclass
class Followed:
    """A running trial, the last step reported to Optuna, and the last step checked for pruning."""

    trial: Trial
    step: int
    judged: int


class Search:
    """The source of the jobs of a search.

    Args:
        space: what trials set.
        fair: overrides that make all trials comparable.
        make: the job of overrides, by its label and number, and by the name of its folder if it has one already.
        check: raises InputError if no run can have these overrides.

    Raises:
        InputError: if the journal is damaged, or does not match sweep.json or the command.
    """

    def __init__(
        self,
        asked: ledger.Search,
        space: Space,
        fair: Sequence[str],
        ledger: Ledger,
        make: Callable[[list[str], str, int, str | None], Job],
        check: Callable[[list[str]], None],
    ):
        self.asked, self.space, self.fair, self.ledger, self.make, self.check = asked, space, fair, ledger, make, check
        self.folder, self.swept = ledger.file.parent, ["trial", *space.open]
        self.study = study(self.folder / JOURNAL, asked)
        self.unnamed: list[FrozenTrial] = []  # trials with values and no job yet
        self.trials = self.known()
        self.followed: dict[str, Followed] = {}
        self.jobs: dict[str, Job] = {}
        self.ends: dict[str, str] = {}
        for name, trial in self.trials.items():
            entry = ledger.jobs[name]
            self.jobs[name] = Job(self.overrides(trial.params), self.folder / name, entry["fingerprint"])
            if trial.state in STATES:
                entry["state"] = STATES[trial.state]
                self.ends[name] = "finished" if trial.state == TrialState.COMPLETE else entry["reason"] or "pruned"
        self.total = max(asked["n_trials"], len(self.jobs))

    def known(self) -> dict[str, FrozenTrial]:
        """Return the known trials by the names of their jobs; for a repeated trial, the last attempt."""
        found: dict[str, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            name = trial.user_attrs.get(JOB)
            if name in self.ledger.jobs and trial.distributions == self.space.open:
                found[name] = trial
            elif trial.state == TrialState.RUNNING:  # the search was killed while Optuna suggested it
                if trial.distributions == self.space.open:
                    self.unnamed.append(trial)
                else:
                    self.study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state != TrialState.FAIL:
                raise InputError(f"{self.folder / JOURNAL} is not of this search: choose another hydra.sweep.dir")
        lost = self.ledger.jobs.keys() - found
        if lost:
            raise InputError(f"{self.folder / JOURNAL} does not know {min(lost)}: choose another hydra.sweep.dir")
        return found

    def todo(self) -> Iterator[Job]:
        for number, (name, trial) in enumerate([*self.trials.items()]):
            if trial.state not in STATES:
                yield self.again(number, name, trial)
        while len(self.jobs) < self.total:
            yield self.next()

    def again(self, number: int, name: str, trial: FrozenTrial) -> Job:
        """Continue an interrupted trial, or repeat a failed one: for Optuna, a second trial with the same values."""
        if trial.state == TrialState.FAIL:
            again = create_trial(
                state=TrialState.RUNNING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
            )
            self.study.add_trial(again)
            trial = self.study.get_trials(deepcopy=False)[-1]
        job = self.make(self.overrides(trial.params), self.label(number, trial.params), number, name)
        if job.fingerprint != self.jobs[name].fingerprint:
            raise InputError(
                f"{self.folder} was begun with other values in conf/, which the rest of it would not compare with: "
                f"choose another hydra.sweep.dir"
            )
        step = max(trial.intermediate_values, default=-1)
        self.followed[name] = Followed(reopen(self.study, trial), step, step - 1)
        self.jobs[name] = job
        return job

    def next(self) -> Job:
        """A new one."""
        number = len(self.jobs)
        seed = derive_seed(self.asked["seed"], number) % 2**32  # the largest that TPESampler takes
        self.study.sampler = TPESampler(seed=seed, n_startup_trials=self.asked["n_startup_trials"])
        unnamed = self.unnamed.pop(0) if self.unnamed else None
        trial = reopen(self.study, unnamed) if unnamed else self.study.ask(self.space.open)
        job = self.make(self.overrides(trial.params), self.label(number, trial.params), number, None)
        if job.name in self.jobs or held(job.folder):
            raise InputError(f"{job.folder} already holds another run: choose another hydra.sweep.dir")
        self.ledger.add(job.name, job.overrides, job.fingerprint, "waiting")
        trial.set_user_attr(JOB, job.name)
        self.followed[job.name] = Followed(trial, -1, -1)
        self.jobs[job.name] = job
        return job

    def overrides(self, params: dict[str, Any]) -> list[str]:
        return [*self.space.point(params), *self.fair]

    def label(self, number: int, params: dict[str, Any]) -> str:
        return f"trial_{number:03d},{label({key: short(params[key]) for key in self.space.open})}"

    def watch(self, running: Sequence[Running | Handed]) -> None:
        for entry in running:
            if isinstance(entry, Running) and entry.verdict is None and (pruned := self.follow(entry.job)):
                entry.end(pruned)

    def follow(self, job: Job) -> str | None:
        """Report the new validations of a trial to Optuna, in order.

        Returns:
            How it ends, if it fell behind. That is judged from values alone, however far the job may be by now.
        """
        followed = self.followed[job.name]
        for step, _, loss in read_validations(job.folder):
            if step > followed.step:
                followed.trial.report(loss, step * job.cost)
                followed.step = step
            if step <= followed.judged or step == job.max_steps:  # at its end there is nothing to save
                continue
            followed.judged = step
            if step >= self.asked["prune_warmup_steps"] and followed.trial.should_prune():
                return f"pruned at step {step:,}"
        return None

    def judge(self, job: Job, how: str) -> str:
        if how == STOPPED:
            return how
        if outcome(how) != "pruned":
            how = self.follow(job) or self.hopeless(job, how)
        trial, verdict = self.followed[job.name].trial, outcome(how)
        if verdict == "finished":
            self.study.tell(trial, job.row(how)["val/loss"])
        else:
            self.study.tell(trial, state=TrialState.PRUNED if verdict == "pruned" else TrialState.FAIL)
        self.trials[job.name] = self.study.get_trials(deepcopy=False)[trial.number]
        return how

    def hopeless(self, job: Job, how: str) -> str:
        """Return how it ended: invalid or diverging settings count as pruned, not failed."""
        results = whole_results(job.folder)
        if how == "finished" and results and results["val/loss"] is None:
            return "pruned: its val loss is infinite or not a number"
        if how.startswith(f"failed: {Diverged.words}"):
            return how.replace("failed", "pruned", 1).partition(";")[0]
        if outcome(how) == "failed":
            try:
                self.check(job.overrides)
            except InputError as error:
                return f"pruned: {error}"
        return how

    def row(self, job: Job, how: str) -> dict[str, Any]:
        values = self.trials[job.name].params if job.name in self.trials else self.followed[job.name].trial.params
        found = (
            {"trial": list(self.jobs).index(job.name)} | {key: values[key] for key in self.space.open} | job.row(how)
        )
        if outcome(how) == "pruned":
            last = self.trials[job.name].value
            found["val/loss"] = last if last is not None and math.isfinite(last) else None
        return found


def study(file: Path, asked: ledger.Search) -> optuna.Study:
    """Return the Optuna study in `file`, or a new one. Only the process that locked the folder may call this.

    Raises:
        InputError: if it is too large or damaged.
    """
    optuna.logging.disable_default_handler()  # charlm reports progress itself
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)  # left by a kill
    some = asked["prune_startup_trials"]
    pruner = MedianPruner(n_startup_trials=some, n_min_trials=max(1, some)) if asked["prune"] else NopPruner()
    try:
        if os.path.lexists(file):
            without_torn_end(file, read_regular(file, LARGEST_JOURNAL))
        # Its other lock is a symbolic link, and a folder that is continued must hold none.
        storage = JournalStorage(JournalFileBackend(str(file), JournalFileOpenLock(str(file))))
        return optuna.create_study(
            storage=storage, study_name="search", direction="minimize", pruner=pruner, load_if_exists=True
        )
    except (InputError, OSError):
        raise
    except Exception as error:  # Optuna takes a journal to be its own, and fails in any way where it is not
        raise InputError(f"{file} is damaged, or not Optuna's: choose another hydra.sweep.dir") from error


def without_torn_end(file: Path, content: bytes) -> None:
    """Cut off the line that a full disk may have left half-written."""
    if not content.endswith(b"\n"):
        with file.open("r+b") as journal:
            journal.truncate(content.rfind(b"\n") + 1)

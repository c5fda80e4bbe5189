"""sweep.json: the jobs of a sweep and their states."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from charlm.errors import InputError
from charlm.files import read_json, write_json
from charlm.run.folder import SWEEP_JSON
from charlm.run.trust import check_key, check_overrides

TABLE = "results.csv"  # written last
FORMAT = 1
LARGEST_LEDGER = 2**26  # bytes of a sweep.json that is read


State = Literal["waiting", "running", "done", "pruned", "failed"]
SETTLED = {"done", "pruned"}  # states with nothing left to do


class Entry(TypedDict):
    """A job, its state, and the reason of a failure."""

    overrides: list[str]
    fingerprint: str
    state: State
    reason: str | None


class Search(TypedDict):
    """The settings of a search: those of hydra.sweeper, and its space in Hydra's grammar."""

    n_trials: int
    seed: int
    n_startup_trials: int
    prune: bool
    prune_startup_trials: int
    prune_warmup_steps: int
    space: dict[str, str]


class Content(TypedDict):
    """A sweep."""

    format: int
    command: list[str]  # the settings that were given, without those of Hydra
    launcher: Literal["local", "slurm", "ray"]  # launcher of the last command
    min_context: int | None  # that all jobs are evaluated with; None: what each one's settings say
    search: Search | None  # None: a grid
    jobs: dict[str, Entry]  # keys: names of their folders


class Ledger:
    """The jobs of a sweep, of all commands that ran in its folder. Every change is written at once, atomically.

    Raises:
        InputError: if the file cannot be read.
    """

    def __init__(self, folder: Path):
        self.file = folder / SWEEP_JSON
        self.content: Content = {
            "format": FORMAT,
            "command": [],
            "launcher": "local",
            "min_context": None,
            "search": None,
            "jobs": {},
        }
        self.is_new = not os.path.lexists(self.file)
        if not self.is_new:
            self.content = read(self.file)

    @property
    def jobs(self) -> dict[str, Entry]:
        return self.content["jobs"]

    def min_context(self, block_sizes: Collection[int], chosen: bool) -> int | None:
        """The data.min_context of all jobs, so that their losses compare: None is as each one's settings say.

        If block sizes differ, it is half the smallest, whose windows then overlap by half. A sweep that grows keeps
        its first value, because its finished jobs do.

        Args:
            chosen: whether the command gives one.

        Raises:
            InputError: if a block size is smaller than this context.
        """
        if self.is_new:
            fair = max(1, min(block_sizes) // 2) if len(set(block_sizes)) > 1 else None
            self.content["min_context"] = None if chosen else fair
        kept = self.content["min_context"]
        if kept and min(block_sizes) < kept:
            raise InputError(
                f"{self.file.parent} compares its jobs after {kept} characters or more, which data.block_size="
                f"{min(block_sizes)} cannot show: give that a sweep of its own"
            )
        return kept

    def begin(self, command: list[str], search: Search | None) -> None:
        """Store the command and the search.

        Raises:
            InputError: if the folder holds another kind of sweep, or another search.
        """
        known = self.content["search"]
        if not self.is_new and not (alike(search, known) and (not search or self.fixed(command) == self.fixed())):
            held = "a grid" if known is None else "a search, of which only hydra.sweeper.n_trials may change"
            raise InputError(f"{self.file.parent} holds {held}: choose another hydra.sweep.dir for this one")
        if self.is_new or not search:
            self.content["command"] = command
        self.content["search"] = search

    def fixed(self, command: Sequence[str] | None = None) -> set[str]:
        """Return the overrides that all trials of a search share, of a command or of the recorded one."""
        searched = self.content["search"]["space"] if self.content["search"] else {}
        return {o for o in command or self.content["command"] if o.partition("=")[0] not in searched}

    def name_of(self, fingerprint: str, wanted: str) -> str:
        """Return the folder name of a job: its present one, else the wanted one, with a number if that is taken."""
        for name, entry in self.jobs.items():
            if entry["fingerprint"] == fingerprint:
                return name
        name, number = wanted, 1
        while name in self.jobs:
            number += 1
            name = f"{wanted}_{number}"
        return name

    def add(self, name: str, overrides: list[str], fingerprint: str, state: State) -> None:
        self.jobs[name] = {"overrides": overrides, "fingerprint": fingerprint, "state": state, "reason": None}

    def set(self, name: str, state: State, reason: str | None = None) -> None:
        self.jobs[name]["state"], self.jobs[name]["reason"] = state, reason
        self.write()

    def write(self) -> None:
        write_json(self.file, self.content)


def alike(one: Search | None, other: Search | None) -> bool:
    """Return whether both searches have the same settings, except for the number of trials, or neither is a search."""
    return one == other if one is None or other is None else {**one, "n_trials": 0} == {**other, "n_trials": 0}


def goes_on(folder: Path, command: list[str], search: Search | None) -> bool:
    """Return whether the sweep in `folder` has the same command and is unfinished.

    Raises:
        InputError: if sweep.json cannot be read.
    """
    content = read(folder / SWEEP_JSON)
    ended = [entry["state"] in SETTLED for entry in content["jobs"].values()]
    left = not all(ended) or len(ended) < (search["n_trials"] if search else 1) or not (folder / TABLE).exists()
    return content["command"] == command and alike(content["search"], search) and left


def read(file: Path) -> Content:
    """Read and validate a sweep.json.

    Raises:
        InputError: if it is damaged or of another version, or records what charlm would not.
        FileNotFoundError: if there is none.
    """
    found = read_json(file, Content, LARGEST_LEDGER, FORMAT)
    space = found["search"]["space"] if found["search"] else {}
    check_overrides(file, [*found["command"], *(f"{key}={words}" for key, words in space.items())])
    for name, entry in found["jobs"].items():
        if name in ("", ".", "..") or name != Path(name).name:
            raise InputError(f"{file} has a job outside of its folder: not run")
        for override in entry["overrides"]:
            check_key(file, override)
    return found

"""run.json: the settings, environment and status of a run.

run.json exists from the first second. Its `status` is running, finished, stopped (by a signal, or by stop_at) or
failed, with the reason; while it runs, its `heartbeat` is at most a minute old: a "running" run with an older one was
killed. `config`, `corpus`, `seed` and `environment` are everything that the run depends on.
"""

import contextlib
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from charlm.errors import DISK_TROUBLE, DiskError, InputError, chain, interrupted, out_of_memory, uninterrupted, warn
from charlm.files import as_json, read_json, remove_partial, write_atomically, write_json
from charlm.run.folder import claim, is_first
from charlm.run.results import RESULTS
from charlm.run.trust import all_references, check_record
from charlm.system import streams

if TYPE_CHECKING:  # Lightning and torch are slow to import, and only training needs them
    import lightning as L

RUN_JSON = "run.json"
FORMAT = 3
SECONDS_BETWEEN_BEATS = 10.0
ROOM = 1000  # bytes of blanks at the end of run.json
LARGEST_RECORD = 2**24  # bytes of a run.json that is read
CHARLM = Path(__file__).parent.parent


class Record(TypedDict):
    """What run.json holds. Times are UTC, as in ISO 8601."""

    format: int
    status: str
    reason: str | None
    step: int
    started: str
    heartbeat: str
    command: str
    process: dict[str, str | int]
    seed: int
    corpus: dict[str, str | int] | None  # None until the text is read
    environment: dict[str, Any]
    config: dict[str, Any]
    follows: dict[str, str]  # settings that refer to others: {"data.seed": "${seed}"}
    earlier: list[dict[str, Any]]  # the processes that trained before it was resumed, and how each of them ended


class Run:
    """Context around a run that keeps run.json up to date, in the first process only.

    Raises:
        InputError: if another process trains in the folder.
    """

    def __init__(self, config: dict[str, Any], follows: dict[str, str]):
        self.folder = Path(config["run_dir"])
        self.step: Callable[[], int] = lambda: 0
        self.before: Record | None = None  # record of an earlier process in the same folder
        self.ended = threading.Event()
        self.pulse = threading.Thread(target=self.beat, daemon=True)
        self.record: Record = {
            "format": FORMAT,
            "status": "running",
            "reason": None,
            "step": 0,
            "started": now(),
            "heartbeat": now(),
            "command": shlex.join(["python", *sys.argv]),
            "process": {"host": socket.gethostname(), "pid": os.getpid()},
            "seed": config["seed"],
            "corpus": None,
            "environment": {},
            "config": config,
            "follows": follows,
            "earlier": [],
        }

    def __enter__(self) -> "Run":
        if is_first():
            if not claim(self.folder):
                raise InputError(f"another process trains in {self.folder} just now: wait for it, or stop it")
            for place in ("", "checkpoints", ".hydra"):  # a run that this folder holds below may be at work
                remove_partial(self.folder / place)
            self.before = previous(self.folder)
            if self.before:
                self.record["earlier"] = [*self.before["earlier"], session(self.before)]
                self.record["follows"] |= self.before["follows"]
            self.record["environment"] = {**environment()}
            self.write()
            self.pulse.start()
        return self

    def tell(
        self,
        config: dict[str, Any],
        corpus: dict[str, str | int],
        trainer: "L.Trainer",
        steps: str,
        initial: str | None = None,
    ) -> None:
        """Add what is known once the trainer exists: resolved config, corpus, device.

        Args:
            steps: how they are made.
            initial: sha256 of the weights of another run that this one begins from; None also for a resumed run.
        """
        import torch

        self.record["config"], self.record["corpus"] = config, corpus
        device = trainer.strategy.root_device
        self.record["environment"] |= {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
            "steps": steps,
        }
        if initial or (self.before and (initial := self.before["environment"].get("initial_weights"))):
            self.record["environment"]["initial_weights"] = initial
        self.step = lambda: trainer.global_step
        self.write()
        if self.before and self.before["step"] and (other := differences(self.before, self.record)):
            changes = ", ".join(f"{name} was {then} and is {now}" for name, (then, now) in other.items())
            warn(f"{changes}: what follows may not be, to the bit, what the unbroken run would have done")

    def beat(self) -> None:
        while not self.ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                self.write()
            except OSError:
                continue  # the next checkpoint reports a broken disk

    def write(self) -> None:
        if is_first():
            self.record["heartbeat"], self.record["step"] = now(), self.step()
            write_atomically(self.folder / RUN_JSON, lambda file: file.write(as_json(self.record) + b" " * ROOM))

    def write_over(self) -> None:
        """Overwrite the old file in place: a full disk has no room for a new one."""
        text = as_json(self.record)
        with (self.folder / RUN_JSON).open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if len(text) <= size:
                file.write(text.ljust(size))

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results and the status; no signal interrupts between the two."""
        with uninterrupted():
            self.ended.set()
            self.pulse.join()
            write_json(self.folder / RESULTS, results)
            try:
                self.record["status"] = "finished"
                self.write()
            except OSError:
                self.record["status"] = "running"
                raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write the final status. Raises DiskError if the disk ended the run."""
        if not is_first() or self.record["status"] == "finished":  # the final status stays
            return
        self.ended.set()
        self.pulse.join()
        trouble = disk_trouble(error, self.folder) if error else None
        self.record["status"], self.record["reason"] = how(trouble or error)
        try:
            self.write()
        except OSError as unwritten:
            if error is None:
                raise DiskError(f"{self.folder / RUN_JSON} could not be written: {unwritten.strerror}") from unwritten
            with contextlib.suppress(OSError):
                self.write_over()
        if trouble:
            raise trouble from error


def disk_trouble(error: BaseException, folder: Path) -> DiskError | None:
    """Return the disk error behind an error, if any. Libraries wrap it in errors of their own."""
    if isinstance(error, DiskError):
        return None  # which tells it
    if not folder.is_dir():
        return DiskError(f"{folder} has vanished while the run wrote there, with all it had saved: start it again")
    for cause in chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK_TROUBLE:
            return DiskError(
                f"{os.fsdecode(cause.filename or folder)}: {cause.strerror}. The run has ended; its checkpoints are "
                f"intact: free space on the disk, then type resume={folder}"
            )
    return None


def how(error: BaseException | None) -> tuple[str, str | None]:
    """Return the status and the reason for the error that ended a run."""
    if error is None:
        return "finished", None
    if interrupted(error):  # which Lightning makes an exit code of 1
        return "stopped", "SIGINT"
    if isinstance(error, SystemExit):
        reasons = {0: "stop_at", 128 + streams.SIGPIPE: "SIGPIPE"}
        reasons |= {128 + number: number.name for number in signal.Signals}
        return ("stopped", reasons[error.code]) if error.code in reasons else ("failed", f"exit code {error.code}")
    if isinstance(error, InputError):
        return "failed", str(error)
    if trouble := out_of_memory(error):
        return "failed", str(trouble)
    line = str(error).strip().partition("\n")[0]
    return "failed", f"{type(error).__name__}: {line}"


def follows(node: dict[str, Any]) -> dict[str, str]:
    """Return the settings that refer to other settings, by dotted name."""
    texts = ((name, leaf) for name, leaf in flat(node).items() if isinstance(leaf, str))
    return {name: leaf for name, leaf in texts if "${" in leaf and all_references(leaf)}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(folder: Path) -> Record:
    """Read run.json and validate it against `Record`.

    Raises:
        InputError: if there is none, or none that can be read, or if it records settings that would be looked up
            outside of it.
    """
    try:
        record = read_json(folder / RUN_JSON, Record, LARGEST_RECORD, FORMAT)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {RUN_JSON}: give a run folder, as python train.py made it") from None
    check_record(folder / RUN_JSON, record["config"], record["follows"])
    return record


def previous(folder: Path) -> Record | None:
    """Return the record of an earlier process in `folder`; None if there is none or if it cannot be read or trusted."""
    try:
        return read_record(folder)
    except (InputError, OSError):
        return None


def differences(then: Record, now: Record) -> dict[str, tuple[Any, Any]]:
    """Return differences of environment and corpus between two records: name -> (then, now).

    The size of groups of steps is left out, because it changes only the speed.
    """
    here = flat({"corpus": now["corpus"]} | now["environment"])
    found: dict[str, tuple[Any, Any]] = {}
    for environment in [*(session["environment"] for session in then["earlier"]), then["environment"]]:
        there = flat({"corpus": then["corpus"]} | environment)
        names = [name for name in there | here if name != "steps"]
        found |= {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}
    return found


def flat(node: Any, place: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names."""
    if isinstance(node, dict):
        return {name: leaf for key, child in node.items() for name, leaf in flat(child, f"{place}.{key}").items()}
    return {place[1:]: node}


def session(record: Record) -> dict[str, Any]:
    """Summarize an earlier process of the run. One whose status is still running was killed."""
    kept = ("status", "reason", "step", "started", "heartbeat", "process", "environment")
    session: dict[str, Any] = {key: record[key] for key in kept}  # type: ignore[literal-required]
    return session | ({"status": "killed"} if session["status"] == "running" else {})


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed: this Python does without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache  # the code that a process has loaded stays as it was
def environment() -> dict[str, Any]:
    """Versions, hardware and git commit that a run depends on."""
    import torch

    required = (re.match(r"[\w.-]+", line) for line in metadata.requires("charlm") or [] if "extra ==" not in line)
    names = sorted({"charlm", *(found[0] for found in required if found)})
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in names if (version := version_of(name))},
        "git": git(),
        "platform": platform.platform(),
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.version.cuda,
    }


def processor() -> str:
    """Return the name of the CPU, on Linux from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def git() -> dict[str, str | bool] | None:
    """Return the commit of charlm's code and whether it has uncommitted changes; None outside a repository."""

    def ask(*question: str) -> str:
        return subprocess.run(
            ["git", "-C", str(CHARLM), *question], capture_output=True, text=True, timeout=10, check=True
        ).stdout

    try:
        # The second line exists only if charlm itself is in the commit, not just inside some other repository.
        commit = ask("rev-parse", "HEAD", "HEAD:./__init__.py").split()[0]
        return {"commit": commit, "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None

"""Jobs on an engine such as Slurm or Ray: submit them, wait for them, and read their state from their folders.

An engine's report about a job is not reliable: Slurm calls a failed job COMPLETED, forgets a killed one, and restarts
one whose machine died. The job's own run.json and results.json are reliable.
"""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm import terminal
from charlm.errors import InputError
from charlm.run.record import RUN_JSON, previous
from charlm.sweep.job import LOG, Job, be, command, last_line
from charlm.sweep.pool import SECONDS_TO_SAVE, STOPPED, terminable
from charlm.system import posix

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_QUESTIONS = 5.0  # Slurm may have many to answer
SECONDS_TO_SUBMIT = 60.0
# Slurm sends one of these before the time limit: the job saves and ends, and submitit requeues it.
AHEAD = posix.signals("SIGUSR1", "SIGUSR2")


@dataclass
class Handed:
    """A submitted job."""

    job: Job
    recorded: int  # when its run.json was written
    log_stamp: int  # when its terminal.log was written
    since: float = 0.0  # 0 where it has not begun

    @property
    def jobs(self) -> Sequence[Job]:
        """The jobs of its process."""
        return (self.job,)

    def news(self) -> bool:
        """Return whether its run.json has changed."""
        before, self.recorded = self.recorded, stamp(self.job.folder / RUN_JSON)
        return self.recorded != before

    def settled(self) -> bool:
        """Return whether it ended in a way that no engine retries."""
        record = previous(self.job.folder)
        return self.job.done() or (record is not None and record["status"] == "failed")

    def how(self, trouble: Sequence[str]) -> str:
        """Return how it ended, by the engine's report only if the job recorded nothing."""
        with suppress(OSError):
            os.listdir(self.job.folder)  # on NFS, listing a folder shows files of other machines
        if self.since or self.job.done():
            return self.job.how(None)
        spoke = stamp(self.job.folder / LOG) != self.log_stamp
        return f"failed: {last_line(self.job.folder / LOG) if spoke else next(iter(trouble), 'it never began')}"


class Engine:
    """Runs jobs as `Pool` does, on an engine. Each job is one task of the engine.

    Args:
        hand: gives jobs to the engine, with its settings, and returns when all of them have ended.
        sweep_dir: parent of their folders.
    """

    def __init__(self, hand: Callable[[dict[str, Any], Sequence[Job]], None], sweep_dir: Path):
        self.hand, self.sweep_dir = hand, sweep_dir
        self.threads: list[threading.Thread] = []
        self.trouble: list[str] = []

    def run(
        self,
        jobs: Iterator[Job],
        total: int,
        begun: Callable[[Job], None],
        ended: Callable[[Job, str], None],
        look: Callable[[list[Handed]], None],
    ) -> None:
        """As `Pool.run`.

        Raises:
            InputError: if the engine does not take the jobs.
            KeyboardInterrupt, SystemExit: after all jobs were stopped, by Ctrl-C or SIGTERM.
        """
        handed = [Handed(job, stamp(job.folder / RUN_JSON), stamp(job.folder / LOG)) for job in jobs]
        if not handed:
            return
        stopping = False
        self.check()
        try:
            self.begin([entry.job for entry in handed])
            with terminable(signal.SIGTERM):  # Ray has just installed a handler of its own
                while handed and self.at_work():
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    for entry in [entry for entry in handed if entry.news()]:
                        if not entry.since:
                            entry.since = time.monotonic()
                            begun(entry.job)
                        if entry.settled():
                            handed.remove(entry)
                            ended(entry.job, entry.how(self.trouble))
                    look([entry for entry in handed if entry.since])
            if self.trouble and not any(
                entry.since or stamp(entry.job.folder / LOG) != entry.log_stamp for entry in handed
            ):
                raise InputError(f"{type(self).__name__} does not take the jobs: {self.trouble[0]}")
        except BaseException:
            stopping = True
            self.stop()
            handed = [entry for entry in handed if entry.since]
            raise
        finally:
            self.end()
            for entry in handed:
                how = entry.how(self.trouble)
                ended(entry.job, STOPPED if stopping and how.startswith("failed") else how)

    def check(self) -> None:
        """Raises InputError: if the engine has jobs of this sweep already."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """Submit all jobs, and return at once."""
        for settings, batch in self.batches(jobs):
            self.threads.append(threading.Thread(target=self.wait_for, args=(settings, batch), daemon=True))
            self.threads[-1].start()

    def wait_for(self, settings: dict[str, Any], batch: Sequence[Job]) -> None:
        """In a thread, because engines wait for one job after the other and stop at the first failure."""
        try:
            self.hand(settings, batch)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines()]
            messages = [line for line in lines if line and not line.startswith(("-", "You can check"))]  # by submitit
            self.trouble.append(messages[-1] if messages else type(error).__name__)

    def batches(self, jobs: Sequence[Job]) -> Iterator[tuple[dict[str, Any], Sequence[Job]]]:
        """Return the jobs and their settings for the engine."""
        for job in jobs:
            yield job.launcher, [job]

    def at_work(self) -> bool:
        """Return whether the engine still has a job."""
        return any(thread.is_alive() for thread in self.threads)

    def stop(self) -> None:
        """Make all jobs save and exit. A second Ctrl-C returns at once."""

    def end(self) -> None:
        """All jobs have ended."""


class Slurm(Engine):
    """Jobs of a sweep as jobs of Slurm. They share one name, which squeue and scancel select.

    Jobs with the same resources form one array.
    """

    def __init__(self, hand: Callable[[dict[str, Any], Sequence[Job]], None], sweep_dir: Path):
        super().__init__(hand, sweep_dir)
        digest = hashlib.sha256(str(sweep_dir).encode()).hexdigest()[:8]
        self.name = re.sub(r"[^\w.-]", "_", sweep_dir.name)[:50] + f"-{digest}"
        self.which = [f"--user={os.getuid()}", f"--name={self.name}"]
        self.asked, self.seen, self.there = 0.0, False, False

    def check(self) -> None:
        if self.ask():
            raise InputError(
                f"jobs of this sweep are still in Slurm's queue: wait for them, or end them with scancel "
                f"{' '.join(self.which)}"
            )

    def begin(self, jobs: Sequence[Job]) -> None:
        self.began = time.monotonic()
        self.jobs, self.asked = len(jobs), 0.0
        super().begin(jobs)

    def batches(self, jobs: Sequence[Job]) -> Iterator[tuple[dict[str, Any], Sequence[Job]]]:
        alike: dict[str, list[Job]] = {}
        for job in jobs:
            alike.setdefault(json.dumps(job.launcher, sort_keys=True), []).append(job)
        for settings, batch in alike.items():
            yield json.loads(settings) | {"name": self.name}, batch

    def at_work(self) -> bool:
        """Return whether jobs are left: threads report success, and only Slurm reports a killed job."""
        waiting = super().at_work()
        if not waiting and not self.trouble:
            return False
        if time.monotonic() - self.asked > SECONDS_BETWEEN_QUESTIONS:
            self.there = self.ask()
            if self.there and not self.seen:
                terminal.handed_over(self.jobs, self.name)
            self.seen |= self.there
        submitting = waiting and not self.seen and time.monotonic() - self.began < SECONDS_TO_SUBMIT
        return self.there or submitting

    def ask(self) -> bool:
        """Return whether the queue has jobs of this sweep; the last answer, if Slurm does not respond."""
        queue = subprocess.run(["squeue", "--noheader", *self.which], capture_output=True, text=True, check=False)
        self.asked = time.monotonic()
        return bool(queue.stdout.strip()) if queue.returncode == 0 else self.there

    def stop(self) -> None:
        with suppress(KeyboardInterrupt):
            subprocess.run(["scancel", *self.which], check=False)  # Slurm sends SIGTERM, and SIGKILL later
            while self.ask():
                time.sleep(SECONDS_BETWEEN_LOOKS)


class Ray(Engine):
    """Jobs of a sweep as tasks of Ray."""

    def begin(self, jobs: Sequence[Job]) -> None:
        self.folders = [job.folder for job in jobs]
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes to the network
        import ray

        try:
            ray.init(**jobs[0].launcher["ray"]["init"])
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"Ray does not begin: {str(error).strip().partition(chr(10))[0]}") from error
        super().begin(jobs)

    def stop(self) -> None:
        """Stop jobs on this machine. Jobs on others can be resumed from their checkpoints."""
        for record in filter(None, map(previous, self.folders)):
            if record["status"] == "running" and record["process"]["host"] == socket.gethostname():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(record["process"]["pid"]), signal.SIGTERM)
        with suppress(KeyboardInterrupt):
            until = time.monotonic() + SECONDS_TO_SAVE
            while self.at_work() and time.monotonic() < until:
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def end(self) -> None:
        import ray

        ray.shutdown()


def work(script: str, options: Sequence[str], overrides: Sequence[str], folder: Path) -> int:
    """Run `python train.py ...` in an engine's process, or resume it. Returns its exit code."""
    queue_again: Any = {number: signal.getsignal(number) for number in AHEAD}
    with output(folder / LOG):
        try:
            with terminable(signal.SIGTERM, *AHEAD):  # until the run installs its own handlers
                be(command(script, options, overrides, folder))
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        if code and "SUBMITIT_EXECUTOR" in os.environ:
            if callable(again := queue_again.get(code - 128)):
                with suppress(Exception):  # submitit raises if it was requeued too often
                    again(code - 128, None)  # the first process ends here
                    return code  # the other processes exit quietly, so that Slurm does not kill the first
            raise SystemExit(code)  # so that Slurm knows as well
    return code


@contextmanager
def output(log: Path) -> Iterator[None]:
    """Redirect the output of this process to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    kept = [os.dup(1), os.dup(2)]
    for number in (1, 2):
        os.dup2(descriptor, number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)


def stamp(file: Path) -> int:
    """Return the time at which a file was written, or 0."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0

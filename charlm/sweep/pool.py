"""Run jobs in parallel, one per core or GPU; a failed job affects no other."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Literal, NoReturn

from charlm.sweep.job import Job, Running
from charlm.sweep.packing import PER_CORE
from charlm.sweep.processes import wait_for
from charlm.system import posix

SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_TO_SAVE = 30.0  # that a stopped job gets
STOPPED = "stopped"  # the end of a job that was interrupted by the end of the sweep


class Pool:
    """Runs jobs in parallel: `n_jobs` at a time, or one per core or GPU.

    Args:
        n_jobs: jobs at a time; "auto": one process per core or GPU.
        jobs_per_gpu: jobs with one process each that share a GPU.
        timeout: longest duration of a job, in minutes.
        gpus: number of GPUs.
    """

    def __init__(self, n_jobs: int | Literal["auto"], jobs_per_gpu: int, timeout: float | None, gpus: int):
        self.n_jobs, self.timeout = n_jobs, timeout
        self.cores = posix.cores()
        self.gpus = [gpu for _ in range(jobs_per_gpu) for gpu in range(gpus)]
        self.running: list[Running] = []
        self.again: list[Job] = []  # jobs whose shared process died
        self.stopping = False

    def run(
        self,
        jobs: Iterator[Job],
        total: int,
        begun: Callable[[Job], None],
        ended: Callable[[Job, str], None],
        look: Callable[[list[Running]], None],
    ) -> None:
        """Run all jobs; call `begun` and `ended` for each, and `look` with the running jobs at intervals.

        Args:
            jobs: consumed one by one as workers become free, because a job may depend on the results of others.
            total: number of jobs.

        Raises:
            KeyboardInterrupt, SystemExit: after all that ran were stopped, by Ctrl-C, SIGTERM or SIGHUP.
            ServerDied: after all jobs were stopped, if the fork server died.
        """
        waiting: Job | None = None
        try:
            while True:
                while self.has_room() and (waiting := waiting or self.next(jobs)) and self.fits(waiting):
                    for job in (waiting, *waiting.others):
                        begun(job)
                    gpus = self.take(waiting.processes) if waiting.on_gpu else []
                    threads = max(1, self.cores // (self.at_once(waiting, total) * waiting.processes))
                    self.running.append(waiting.start(threads, gpus))
                    waiting = None
                if not self.running and not self.again:
                    return
                wait_for([running.process for running in self.running], SECONDS_BETWEEN_LOOKS)
                self.hurry()
                self.reap(ended)
                look(self.running)
        except BaseException:
            self.stop(ended)
            raise

    def next(self, jobs: Iterator[Job]) -> Job | None:
        """Return the next job to start; None if none is left."""
        return self.again.pop() if self.again else next(jobs, None)

    def at_once(self, job: Job, total: int) -> int:
        """Return how many of `total` jobs like this one run at a time."""
        if self.n_jobs != "auto":
            return min(self.n_jobs, total)
        room = len(self.gpus) + sum(len(running.gpus) for running in self.running) if job.on_gpu else self.cores
        return max(1, min(total, room // job.processes))

    def has_room(self) -> bool:
        """Return whether there is room for another small job."""
        return not self.running or self.fits(replace(self.running[-1].job, processes=1))

    def fits(self, job: Job) -> bool:
        """Return whether another job may start; the first always may."""
        if not self.running:
            return True
        if job.on_gpu and len(set(self.gpus)) < job.processes:
            return False
        if self.n_jobs != "auto":
            return len(self.running) < self.n_jobs
        return job.on_gpu or cores_of(job) + sum(cores_of(running.job) for running in self.running) <= self.cores

    def take(self, number: int) -> list[int]:
        """Return distinct GPUs for a job, the least busy first."""
        taken = sorted(set(self.gpus), key=lambda gpu: (-self.gpus.count(gpu), gpu))[:number]
        for gpu in taken:
            self.gpus.remove(gpu)
        return taken

    def hurry(self) -> None:
        """Stop jobs that exceed the timeout, and kill those that ignore a request to stop."""
        for running in self.running:
            if self.timeout is not None and time.monotonic() > running.since + 60 * self.timeout:
                running.end(f"failed: no end within {self.timeout:g} minutes")
            if running.warned_at is not None and time.monotonic() > running.warned_at + SECONDS_TO_SAVE:
                running.process.kill()

    def reap(self, ended: Callable[[Job, str], None]) -> None:
        for running in [running for running in self.running if not running.process.is_alive()]:
            running.process.kill()  # processes that it left behind
            self.running.remove(running)
            self.gpus += running.gpus
            shared = len(running.jobs) > 1
            died = shared and not self.stopping and running.verdict is None
            for job in running.jobs:
                if died and job.unsettled():  # perhaps by another job of its process: it goes on alone
                    self.again.append(replace(job, others=()))
                    continue
                how = running.verdict or job.how(None if shared else running.process.exitcode)
                ended(job, STOPPED if self.stopping and how.startswith("failed") else how)

    def stop(self, ended: Callable[[Job, str], None]) -> None:
        """Make all jobs save and exit. A second Ctrl-C kills them."""
        self.stopping = True
        until = time.monotonic() + SECONDS_TO_SAVE
        killed = False
        for running in self.running:
            running.process.terminate()
        while self.running:
            try:
                if time.monotonic() > until and not killed:
                    raise KeyboardInterrupt
                wait([running.process.connection for running in self.running], SECONDS_BETWEEN_LOOKS)
            except (KeyboardInterrupt, SystemExit):
                killed = True
                for running in self.running:
                    running.process.kill()
            self.reap(ended)


def cores_of(job: Job) -> float:
    """Return how many cores a job keeps busy."""
    return 1 / PER_CORE if job.others else job.processes


@contextmanager
def terminable(*numbers: signal.Signals) -> Iterator[None]:
    """Raise signals as exceptions, so that the jobs are stopped."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before: Any = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Run a sweep: the jobs that are not done, in parallel, and a table of all."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from charlm import terminal
from charlm.errors import InputError, stop
from charlm.home import COMMAND
from charlm.preflight.command_line import options
from charlm.run.folder import held
from charlm.run.table import outcome, rank, write_csv
from charlm.sweep.engine import Engine, Handed
from charlm.sweep.job import LOG, Job, Running
from charlm.sweep.ledger import TABLE, Ledger, State
from charlm.sweep.names import settings, varying
from charlm.sweep.plan import is_sweep
from charlm.sweep.pool import STOPPED, Pool
from charlm.sweep.processes import ServerDied
from charlm.system import streams


class Source(Protocol):
    """The source of the jobs of a sweep."""

    jobs: dict[str, Job]  # created so far, by name
    total: int  # that there will be
    swept: list[str]  # the settings in which they differ
    ends: dict[str, str]  # verdicts of finished jobs, by name

    def todo(self) -> Iterator[Job]:
        """Yield the jobs that are left, each created on demand."""

    def watch(self, running: Sequence[Running | Handed]) -> None:
        """Look at the running jobs; may stop some."""

    def judge(self, job: Job, how: str) -> str:
        """Return the verdict on a job that ended."""

    def row(self, job: Job, how: str) -> dict[str, Any]:
        """Return its row of the table."""


class Grid:
    """A source of jobs that are known in advance.

    Args:
        packed: puts jobs together that share a process.

    Raises:
        InputError: if a job's folder already holds another run.
    """

    def __init__(
        self, jobs: Sequence[Job], ledger: Ledger, packed: Callable[[Sequence[Job]], Sequence[Job]] = lambda jobs: jobs
    ):
        for job in jobs:
            if job.name not in ledger.jobs and held(job.folder):
                raise InputError(f"{job.folder} already holds a run of another sweep: choose another hydra.sweep.dir")
        for job in jobs:
            ledger.add(job.name, job.overrides, job.fingerprint, "done" if job.done() else "waiting")
        self.jobs = {job.name: job for job in jobs}
        self.total, self.packed = len(self.jobs), packed
        self.swept = varying([job.overrides for job in jobs])
        self.ends = {job.name: "finished" for job in jobs if job.done()}

    def todo(self) -> Iterator[Job]:
        yield from self.packed([job for name, job in self.jobs.items() if name not in self.ends])

    def watch(self, running: Sequence[Running | Handed]) -> None:
        pass

    def judge(self, job: Job, how: str) -> str:
        return how

    def row(self, job: Job, how: str) -> dict[str, Any]:
        values = settings(job.overrides)
        return {key: values[key] for key in self.swept} | job.row(how)


def run_jobs(source: Source, ledger: Ledger, sweep_dir: Path, pool: Pool | Engine) -> dict[str, dict[str, Any]]:
    """Run the jobs that are not done, however some of them end, and show what all found.

    Returns:
        The final figures of each job, by its name.

    Raises:
        SystemExit: with code 1, after the last job, if any failed; 129, 130, 141 or 143 if the sweep was stopped.
    """
    ledger.write()
    (sweep_dir / TABLE).unlink(missing_ok=True)
    ends, left = source.ends, source.total - len(source.ends)
    if ends and left:
        terminal.going_on(sweep_dir, len(ends), left)
    stopped: int | None = None
    why = ""
    with terminal.sweep_at_work(left) as display:

        def ended(job: Job, how: str) -> None:
            ends[job.name] = how = source.judge(job, how)
            verdict = outcome(how)
            states: dict[str, State] = {"finished": "done", STOPPED: "waiting", "pruned": "pruned"}
            ledger.set(job.name, states.get(verdict, "failed"), None if how == "finished" else how)
            display.ended(job.name, source.row(job, how))

        def look(running: Sequence[Running | Handed]) -> None:
            source.watch(running)
            display.look(
                [(job.name, job.folder, job.max_steps, entry.since) for entry in running for job in entry.jobs]
            )
            if streams.reader_left:
                raise SystemExit(128 + streams.SIGPIPE)  # which stops the jobs, as a signal does

        try:
            pool.run(source.todo(), source.total, lambda job: ledger.set(job.name, "running"), ended, look)
        except KeyboardInterrupt:
            stopped = 130
        except SystemExit as error:
            stopped = int(error.code or 0)
        except ServerDied as died:
            stopped, why = died.code, f"{died}; "
    rows = {name: source.row(job, ends.get(name, "waiting")) for name, job in source.jobs.items()}
    ranked = rank([*rows.values()])
    write_csv(sweep_dir / TABLE, ranked, source.swept)
    finished = {name: row["val/loss"] for name, row in rows.items() if row["status"] == "finished"}
    losses = {name: loss for name, loss in finished.items() if loss is not None}
    best = source.jobs[min(losses, key=losses.__getitem__)].overrides if losses else []
    alone = ["hydra.mode=RUN"] if is_sweep(best) else []  # and not the whole study again
    terminal.sweep_summary(sweep_dir, ranked, source.swept, [*options(sys.argv), *best, *alone] if best else [])
    elsewhere = f" hydra/launcher={ledger.content['launcher']}" * (ledger.content["launcher"] != "local")
    done = sum(outcome(row["status"]) in ("finished", "pruned") for row in ranked)
    again = f"; the rest: {COMMAND} resume={terminal.quote(sweep_dir)}{elsewhere}" * (done < source.total)
    if stopped:
        stop(f"{why}stopped with {done} of {source.total} jobs done{again}", stopped)
    if done < source.total:
        why = f"see {LOG} in their folders under {terminal.quote(sweep_dir)}"
        stop(f"{source.total - done} of {source.total} jobs failed; {why}{again}", 1)
    return rows

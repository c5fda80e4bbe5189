"""A sweep from beginning to end: only what is not done yet, side by side, and a table of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from charlm import report, terminal
from charlm.errors import InputError, stop
from charlm.ledger import Ledger
from charlm.preflight import held
from charlm.sweep.job import LOG, Job, Running
from charlm.sweep.names import settings, varying
from charlm.sweep.pool import Pool


def run_jobs(jobs: Sequence[Job], ledger: Ledger, sweep_dir: Path, pool: Pool) -> list[dict[str, Any]]:
    """Run the jobs that are not done, however some of them end, and show what all found.

    Returns:
        The final figures of each job, in order.

    Raises:
        InputError: if a job's folder already holds another run; then none has started.
        SystemExit: with code 1, after the last job, if any did not finish; 130 or 143 if the sweep was stopped.
    """
    for job in jobs:
        if job.name not in ledger.jobs and held(job.folder):
            raise InputError(f"{job.folder} already holds a run of another sweep: choose another hydra.sweep.dir")
    for job in jobs:
        ledger.add(job.name, job.overrides, job.fingerprint, "done" if job.done() else "waiting")
    ledger.write()
    swept = varying([job.overrides for job in jobs])
    ends = {job.name: "finished" for job in jobs if job.done()}
    todo = list({job.name: job for job in jobs if job.name not in ends}.values())
    if ends and todo:
        terminal.going_on(sweep_dir, len(ends), len(todo))
    stopped: int | None = None
    with terminal.sweep_at_work(len(todo)) as sight:

        def ended(job: Job, how: str) -> None:
            ends[job.name] = how
            ledger.set(job.name, "done" if how == "finished" else "failed", None if how == "finished" else how)
            sight.ended(job.name, job.row(how))

        def look(running: Sequence[Running]) -> None:
            sight.look([(one.job.name, one.job.folder, one.job.max_steps, one.since) for one in running])

        try:
            pool.run(todo, lambda job: ledger.set(job.name, "running"), ended, look)
        except KeyboardInterrupt:
            stopped = 130
        except SystemExit as told:
            stopped = int(told.code or 0)
    values = {job.name: settings(job.overrides) for job in jobs}
    rows = [{key: values[job.name][key] for key in swept} | job.row(ends.get(job.name, "waiting")) for job in jobs]
    ranked = report.ranked(rows)
    report.write_csv(sweep_dir / "results.csv", ranked)
    terminal.sweep_summary(sweep_dir, ranked, swept)
    missing = sum(row["status"] != "finished" for row in rows)
    place = terminal.quote(sweep_dir)
    again = f"the rest: python train.py resume={place}"
    if stopped:
        stop(f"stopped with {len(rows) - missing} of {len(rows)} jobs done; {again}", stopped)
    if missing:
        stop(f"{missing} of {len(rows)} jobs failed; each one's {LOG} under {place} tells why; {again}", 1)
    return rows

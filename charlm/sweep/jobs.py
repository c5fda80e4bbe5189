"""The jobs of a sweep, each in a fresh process with its own command line, log and folder.

Hydra's own launcher runs all jobs in one process. There, settings leak from one job to the next, a killed job takes
the rest with it, and a job that trains on several devices starts the whole sweep again in each of its processes. Here
a fork server pays for the imports once, and each job is what `python train.py ...` would have been.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm import report, terminal
from charlm.errors import stop
from charlm.preflight import check_folder
from charlm.resume import quoted

LOG = "terminal.log"  # all that a job prints
# What the fork server imports before the first job.
PRELOAD = ["lightning", "charlm.callbacks", "charlm.evaluate", "charlm.logger", "charlm.preflight", "charlm.sweep"]
UNSAFE = str.maketrans(dict.fromkeys("/\\:*?\"'<>| ", "-"))


@dataclass(frozen=True)
class Job:
    """One combination of a sweep."""

    overrides: list[str]
    folder: Path

    def run(self) -> dict[str, Any]:
        """Train, in a fresh process. Returns the final figures, or only a status that says how it ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / LOG
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        argv = [sys.argv[0], *self.overrides, f"hydra.run.dir={quoted(self.folder)}"]
        process = context.Process(target=become, args=(argv, str(log)))
        process.start()
        try:
            process.join()
        finally:  # Ctrl-C here ends the job as well
            if process.is_alive():
                process.terminate()
                process.join()
        results = report.read_results(self.folder)
        if results is not None and process.exitcode == 0:
            return {key: value for key, value in results.items() if not isinstance(value, dict)}
        code = process.exitcode or 0
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        reason = f"killed by signal {-code}" if code < 0 else said[-1] if said else f"exit code {code}"
        return {"status": f"failed: {reason}", "val/loss": None}


def become(argv: list[str], log: str) -> None:
    """In the job's process: be `python train.py ...`, with all output in the job's own file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run_jobs(jobs: list[Job], sweep_dir: Path) -> list[dict[str, Any]]:
    """Run the jobs one after the other, however some of them end, and show what they found.

    Returns:
        The final figures of each job, in order.

    Raises:
        InputError: if a job's folder already holds a run; then none has started.
        SystemExit: with code 1, after the last job, if any did not finish.
    """
    swept = varying([job.overrides for job in jobs])
    for job in jobs:
        check_folder(job.folder)
    rows = []
    with terminal.tracked("sweep") as progress:
        for number, job in enumerate(jobs, start=1):
            values = settings(job.overrides)
            row = {key: values[key] for key in swept} | job.run()
            terminal.job_ended(number, len(jobs), job.folder.name, row)
            rows.append(row)
            progress(number, len(jobs))
    ranked = report.ranked(rows)
    report.write_csv(sweep_dir / "results.csv", ranked)
    terminal.sweep_summary(sweep_dir, ranked, swept)
    failed = sum(row["status"] != "finished" for row in rows)
    if failed:
        stop(f"{failed} of {len(rows)} jobs failed; each one's {LOG} under {sweep_dir} tells why", 1)
    return rows


def settings(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides as names and values."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def varying(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """The settings that differ between jobs, in the order of the command line."""
    jobs = [settings(overrides) for overrides in job_overrides]
    return [key for key in jobs[0] if len({job.get(key) for job in jobs}) > 1]


def names(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """A readable name for each job, such as block_size=8,lr=1e-2, with a number where that is not one's own."""
    swept = varying(job_overrides)
    short = {key: key.rpartition(".")[2] for key in swept}
    if len(set(short.values())) < len(swept):
        short = {key: key for key in swept}
    made: list[str] = []
    for number, overrides in enumerate(job_overrides):
        values = settings(overrides)
        # 200 bytes leave room for a suffix under the 255 that file systems allow.
        name = ",".join(f"{short[key]}={values[key]}" for key in swept).translate(UNSAFE)[:200]
        made.append(name if name and name not in made else f"{name or 'job'}_{number}")
    return made

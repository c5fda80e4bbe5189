"""One job of a sweep: a fresh process with its own command line, environment, log and folder.

Hydra's own launcher runs all jobs in one process. There, settings leak from one job to the next, a killed job takes
the rest with it, and a job that trains on several devices starts the whole sweep again in each of its processes. Here
each job is what `python train.py ...` would have been.
"""

import os
import pickle
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from charlm.budget import steps_of, tokens_of_step, within_tokens
from charlm.files import is_regular
from charlm.internals.hydra import job_callbacks
from charlm.preflight.command_line import options
from charlm.run.overrides import quoted
from charlm.run.record import previous
from charlm.run.results import in_characters, whole_results
from charlm.sweep.processes import Child, launch
from charlm.system import streams

LOG = "terminal.log"  # all that a job prints
FRAMES = 300  # of Python's stack that a job of a pack may use, at most


Task = tuple[list[str], bytes | None, str]  # of a job: its command line, its config if known, the file of its output


@dataclass(frozen=True)
class Job:
    """One combination of a sweep."""

    overrides: list[str]
    folder: Path
    fingerprint: str  # hash of its whole config
    processes: int = 1  # it trains with so many
    on_gpu: bool = False
    max_steps: int = -1  # which end it, if nothing does before
    cost: int = 1  # of a step: tokens, where it is by them that jobs compare
    cfg: bytes | None = None  # as Hydra composed it, pickled: which takes longer than to hand it over
    launcher: dict[str, Any] = field(default_factory=dict)  # the settings of the engine that runs it
    kind: str | None = None  # what the jobs that may share its process have in common
    others: tuple["Job", ...] = ()  # jobs that share its process

    @classmethod
    def of(
        cls,
        overrides: list[str],
        folder: Path,
        fingerprint: str,
        plain: dict[str, Any],
        cfg: bytes,
        launcher: dict[str, Any],
        gpus: int,
        kind: Callable[[bool], str | None] = lambda on_gpu: None,
    ) -> "Job":
        """Return the job of a config, which is also given as plain types, on a machine with `gpus`."""
        trainer = plain["trainer"]
        gpus = gpus if trainer["accelerator"] in ("auto", "gpu", "cuda") else 0
        devices = trainer["devices"]
        if isinstance(devices, str) and devices != "auto":
            devices = [int(d) for d in devices.split(",")] if "," in devices else int(devices)
        several = {"auto": 1, -1: gpus or 1}
        processes = len(devices) if isinstance(devices, list) else several.get(devices, devices)
        steps = steps_of(trainer["max_steps"], plain["max_tokens"], trainer["max_time"])
        tokens = tokens_of_step(plain, processes)
        steps = within_tokens(steps, plain["max_tokens"], tokens)
        cost = tokens if plain["max_tokens"] else 1
        on_gpu = gpus > 0
        return cls(overrides, folder, fingerprint, processes, on_gpu, steps, cost, cfg, launcher, kind(on_gpu))

    @property
    def name(self) -> str:
        return self.folder.name

    def done(self) -> bool:
        """Return whether the job has final figures."""
        record = previous(self.folder)
        return record is not None and record["status"] == "finished" and whole_results(self.folder) is not None

    def unsettled(self) -> bool:
        """Return whether its process ended without a word about the job."""
        record = previous(self.folder)
        return not self.done() and (record is None or record["status"] in ("running", "finished"))

    def start(self, threads: int, gpus: Sequence[int]) -> "Running":
        """Start or resume the job, and those that share its process, in a fresh process."""
        first, *others = [job.task() for job in (self, *self.others)]
        if others:
            process = launch(become_pack, [first, *others], list(gpus), daemon=False)
        else:
            process = launch(become, *first, threads, list(gpus), daemon=False)
        return Running(self, process, time.monotonic(), list(gpus))

    def task(self) -> "Task":
        """Make the folder of the job, and return what its process needs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        argv = command(sys.argv[0], options(sys.argv), self.overrides, self.folder)
        # A job that has begun is resumed, with the checks of resume=.
        return argv, None if has_begun(self.folder) else self.cfg, str(self.folder / LOG)

    def how(self, code: int | None) -> str:
        """Return how its process ended: finished, or failed with the reason. The exit code may be unknown."""
        if not code and self.done():
            return "finished"
        record = previous(self.folder)
        if code is None and record and record["status"] == "running":
            return "failed: killed"
        if code is not None and code < 0:
            return f"failed: killed by {signal.Signals(-code).name}"
        if record and record["status"] in ("failed", "stopped"):
            by = "stopped by " if record["status"] == "stopped" else ""
            return f"failed: {by}{record['reason']}"
        return f"failed: {(code and last_line(self.folder / LOG)) or f'exit code {code}'}"

    def row(self, status: str) -> dict[str, Any]:
        """Return its final figures, or only how it ended."""
        results = whole_results(self.folder) if status == "finished" else None
        if results is None:
            return {"status": status, "val/loss": None}
        found = {key: value for key, value in results.items() if not isinstance(value, dict)}
        return found | in_characters(results)


@dataclass
class Running:
    """A job at work."""

    job: Job
    process: Child
    since: float
    gpus: list[int]
    verdict: str | None = None  # set if the sweep stops the job
    warned_at: float | None = None  # when, by time.monotonic()

    @property
    def jobs(self) -> Sequence[Job]:
        """The jobs of its process."""
        return self.job, *self.job.others

    def end(self, verdict: str) -> None:
        """Make the job save and exit; called once."""
        if self.verdict is None:
            self.verdict, self.warned_at = verdict, time.monotonic()
            self.process.terminate()


def become(connection: Connection, argv: list[str], cfg: bytes | None, log: str, threads: int, gpus: list[int]) -> None:
    """Run `python train.py ...` in the job's process, with all output in the job's file.

    Args:
        connection: open as long as the job runs.
        cfg: what Hydra would compose from `argv`, checked already, and pickled.
    """
    streams.write_to(log)
    prepare(threads, gpus)
    be(argv, pickle.loads(cfg) if cfg else None)


def become_pack(connection: Connection, jobs: Sequence[Task], gpus: list[int]) -> None:
    """Run several jobs in one process, which trains them together, on a CPU with one thread.

    Args:
        connection: open as long as the jobs run.
        jobs: what `become` takes of each.
    """
    prepare(1, gpus)
    from charlm.speed import GroupedSteps
    from charlm.speed.pack import Pack

    sys.setrecursionlimit(sys.getrecursionlimit() + FRAMES * len(jobs))
    GroupedSteps.pack = Pack([partial(be_apart, *job) for job in jobs])
    GroupedSteps.pack.run()


def be_apart(argv: list[str], cfg: bytes | None, log: str) -> None:
    """Run one of several jobs, and leave the process to the others as it was."""
    from charlm.speed.pack import Outputs

    outputs, hydra = Outputs(), HydraConfig.instance().cfg
    streams.write_to(log)
    try:
        be(argv, pickle.loads(cfg) if cfg else None)
    except SystemExit:
        pass  # run.json says why
    except BaseException:
        traceback.print_exc()
    finally:
        outputs.return_to()
        HydraConfig.instance().cfg = hydra


def prepare(threads: int, gpus: list[int]) -> None:
    """Set up this process for a job: its environment, and the number of its threads."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]  # inside a Slurm allocation, the job starts its own processes
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by its child processes
    import torch  # slow to import; after the environment variables that it reads

    torch.set_num_threads(threads)


def has_begun(folder: Path) -> bool:
    """Return whether there is a checkpoint to resume from."""
    return any((folder / "checkpoints").glob("*.ckpt"))


def command(script: str, options: Sequence[str], overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command line that starts or resumes a job."""
    run_dir = [f"hydra.run.dir={quoted(folder)}", "hydra.mode=RUN"]  # overrides the mode of a study
    what = [f"resume={quoted(folder)}"] if has_begun(folder) else [*overrides, *run_dir]
    return [script, *options, *what]


def be(argv: list[str], cfg: DictConfig | None = None) -> None:
    """Run `python train.py ...` in this process. `cfg`: its composed config, if known."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = argv
    if cfg is None:
        runpy.run_path(argv[0], run_name="__main__")
        return
    setup_globals()
    JobRuntime.instance().set("name", cfg.hydra.job.name)
    context: Any = HydraContext(config_loader=None, callbacks=job_callbacks(cfg))  # type: ignore[arg-type]
    main = runpy.run_path(argv[0], run_name="train")["main"]
    run_job(main, cfg, "hydra.run.dir", None, context).return_value  # noqa: B018, as it raises what the job has raised


def last_line(log: Path) -> str:
    """Return the last line that a job printed, or an empty text."""
    lines = log.read_text(errors="replace").strip().splitlines() if is_regular(log) else []
    return lines[-1] if lines else ""


def visible_gpus(slots: list[int], visible: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES for a process that gets some of the GPUs of its parent.

    Args:
        slots: numbers of GPUs as the parent sees them.
        visible: the parent's own CUDA_VISIBLE_DEVICES: numbers, UUIDs or names of MIG slices; None if it has none.
    """
    names = [name.strip() for name in visible.split(",")] if visible else []
    return ",".join(names[slot] if slot < len(names) else str(slot) for slot in slots)

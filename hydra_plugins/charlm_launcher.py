"""Where Hydra looks for plugins, and accepts them from no other package: `-m` launches its jobs by charlm.sweep."""

import hashlib
import json
import logging
import os
import pickle
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:  # imported where they are needed, as every single run finds this file too
    from charlm.sweep import Engine, Job, Pool, Ray, Slurm, Source
    from charlm.sweep.ledger import Ledger


GPU = ("gpu", "cuda")
JOBS_OF_SMALL_MODELS = 3  # on one GPU, which a single small model leaves idle most of the time
ROOT = Path(__file__).parent.parent


class SweepLauncher(Launcher):
    """Keeps the ledger of a sweep, and runs its jobs on a pool or an engine."""

    cautions: Sequence[str] = ()  # that were printed: a search checks again and again
    pack: int | Literal["auto"] = 1  # jobs in a process

    @abstractmethod
    def pool(self, gpus: int) -> "Pool | Engine": ...

    def settings(self, cfg: DictConfig) -> dict[str, Any]:
        """Return the engine's settings for one job."""
        return {}

    def packed(self, jobs: "Sequence[Job]") -> "Sequence[Job]":
        """Put jobs together that share a process: none, on an engine."""
        return jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from charlm.errors import raise_received

        raise_received()
        self.context, self.config = hydra_context, config
        load = hydra_context.config_loader.load_sweep_config
        self.compose = cache(lambda given: load(config, list(given)))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from charlm.sweep import Grid, names
        from charlm.sweep.ledger import Ledger

        ledger = Ledger(self.sweep_dir)
        ledger.begin(self.command, None)
        ledger.content["launcher"] = self.config.hydra.runtime.choices["hydra/launcher"]
        cfgs = self.composed(job_overrides)
        fair = self.fair(ledger, cfgs)
        todo = [
            self.job(cfg, [*given, *fair], name, number, ledger.name_of)
            for number, (given, name, cfg) in enumerate(zip(job_overrides, names(job_overrides), cfgs, strict=True))
        ]
        gpus = self.check([run for run, _ in todo])
        jobs = [make(gpus) for _, make in todo]
        rows = self.run(Grid(jobs, ledger, self.packed), ledger, gpus)
        returned = []
        for job in jobs:
            one = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            one.return_value = rows[job.name]["val/loss"]  # what a sweeper that searches minimises
            returned.append(one)
        return returned

    @property
    def sweep_dir(self) -> Path:
        return Path(self.config.hydra.sweep.dir).absolute()

    @property
    def command(self) -> list[str]:
        """The settings that were given, as they were typed."""
        typed: Any = OmegaConf.to_container(self.config.hydra.overrides.task, resolve=False)
        given: list[str] = typed
        return given

    def composed(self, job_overrides: Sequence[Sequence[str]]) -> list[DictConfig]:
        from charlm.sweep.composition import composed

        return list(composed(job_overrides, self.compose))

    def fair(self, ledger: "Ledger", cfgs: Sequence[DictConfig]) -> list[str]:
        """Return overrides that make jobs of several block sizes comparable (`Ledger.min_context`), also in `cfgs`."""
        sizes = [cfg.data.block_size for cfg in cfgs]
        if not all(isinstance(size, int) for size in sizes):
            return []  # the check tells
        chosen = any(o.startswith("data.min_context=") for o in ledger.content["command"])
        min_context = ledger.min_context(sizes, chosen)
        if min_context is None:
            return []
        for cfg in cfgs:
            cfg.data.min_context = min_context
        return [f"data.min_context={min_context}"]

    def job(
        self, cfg: DictConfig, overrides: list[str], name: str, number: int, place: Callable[[str, str], str]
    ) -> "tuple[dict[str, Any], Callable[[int], Job]]":
        """Return the resolved config to check, and a function from the number of GPUs to the job.

        Args:
            cfg: what `overrides` were composed to.
            name: name of the job, for hydra.sweep.subdir.
            place: the name of its folder, from its fingerprint and what hydra.sweep.subdir wants.
        """
        from charlm.preflight.configs import RUN_DIR, resolved, without_hydra
        from charlm.run.resume import moved
        from charlm.sweep import Job
        from charlm.sweep.packing import kind_of

        with open_dict(cfg):
            cfg.hydra.job.id, cfg.hydra.job.num = name, number
            cfg.hydra.sweep.dir, cfg.hydra.mode = str(self.sweep_dir), "RUN"
        HydraConfig.instance().cfg = cfg  # resolves ${hydra:...}; `set_config` would copy the config first
        run = resolved(without_hydra(cfg))
        itself = json.dumps(moved(run, RUN_DIR, ""), sort_keys=True)  # all that it is, wherever it is
        fingerprint = hashlib.sha256(itself.encode()).hexdigest()
        folder = self.sweep_dir / place(fingerprint, cfg.hydra.sweep.subdir)
        cfg.hydra.run.dir = str(folder)
        kind = partial(kind_of, run, chdir=bool(cfg.hydra.job.chdir), rounding=self.pack != "auto")
        return run, partial(
            Job.of, overrides, folder, fingerprint, run, pickle.dumps(cfg), self.settings(cfg), kind=kind
        )

    def check(self, runs: Sequence[dict[str, Any]]) -> int:
        """Returns how many GPUs there are, if all runs are possible; see `check_runs`."""
        from charlm.errors import warn
        from charlm.sweep import processes
        from charlm.sweep.checks import check_runs

        gpus, cautions, self.small = processes.ask(check_runs, runs, isinstance(self, EngineLauncher))
        for line in [line for line in cautions if line not in self.cautions]:
            warn(line)
        self.cautions = [*self.cautions, *cautions]
        return int(gpus)

    def run(self, source: "Source", ledger: "Ledger", gpus: int) -> dict[str, dict[str, Any]]:
        """Create the folder of the sweep and run its jobs; nothing is written before."""
        from charlm.sweep import run_jobs

        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.sweep_dir / "multirun.yaml")  # as Hydra does
        return run_jobs(source, ledger, self.sweep_dir, self.pool(gpus))


class LocalLauncher(SweepLauncher):
    """hydra/launcher=local: every job as a fresh process on this machine."""

    def __init__(
        self,
        n_jobs: Annotated[int, Ge(1)] | Literal["auto"],
        jobs_per_gpu: Annotated[int, Ge(1)] | Literal["auto"],
        timeout: Annotated[float, Gt(0)] | None,
        pack: Annotated[int, Ge(1)] | Literal["auto"] = "auto",
    ):
        self.limits: Any = {"n_jobs": n_jobs, "jobs_per_gpu": jobs_per_gpu, "timeout": timeout}
        self.pack = pack if timeout is None else 1  # the limit is one job's

    def packed(self, jobs: "Sequence[Job]") -> "Sequence[Job]":
        from charlm.sweep.packing import packed

        return packed(jobs, self.pack, self.limits["n_jobs"])

    def pool(self, gpus: int) -> "Pool":
        from charlm.sweep import Pool

        share = JOBS_OF_SMALL_MODELS if self.small else 1
        limits = self.limits | ({"jobs_per_gpu": share} if self.limits["jobs_per_gpu"] == "auto" else {})
        return Pool(**limits, gpus=gpus)


class EngineLauncher(SweepLauncher):
    """Runs jobs by another launcher of Hydra, with its settings, which may depend on the job."""

    target = ""

    def __init__(self, **settings: Any):
        logging.getLogger("hydra_plugins").setLevel(logging.ERROR)  # the table reports it
        # Jobs import the charlm that is next to train.py, not an installed one.
        places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, places)]))

    def settings(self, cfg: DictConfig) -> dict[str, Any]:
        found: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
        return {name: value for name, value in found.items() if name != "_target_"}

    def hand_over(self, settings: dict[str, Any], jobs: "Sequence[Job]") -> None:
        """Returns when all have ended.

        Raises:
            Exception: an error of the engine, if it refuses or loses a job.
        """
        from charlm.preflight.command_line import options
        from charlm.run.overrides import quoted

        script, folder = os.path.abspath(sys.argv[0]), jobs[0].folder.parent
        engine = get_class(self.target)(**OmegaConf.create(settings))
        task = Task(script, options(sys.argv), os.getcwd())
        engine.setup(hydra_context=self.context, task_function=task, config=self.config)
        places = [f"hydra.sweep.dir={quoted(folder)}", "hydra.output_subdir=null"]
        engine.launch([[*job.overrides, f"hydra.sweep.subdir={quoted(Path(job.name))}", *places] for job in jobs], 0)


class SlurmLauncher(EngineLauncher):
    """hydra/launcher=slurm: by hydra-submitit-launcher."""

    target = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"

    def settings(self, cfg: DictConfig) -> dict[str, Any]:
        found = super().settings(cfg)
        given = any(found[name] for name in ("gres", "gpus_per_node", "gpus_per_task"))
        if cfg.trainer.accelerator in GPU and not given:
            found["gpus_per_node"] = found["tasks_per_node"]
        return found

    def pool(self, gpus: int) -> "Slurm":
        from charlm.internals.submitit import do_not_ask_sacct
        from charlm.sweep import Slurm

        do_not_ask_sacct()
        return Slurm(self.hand_over, self.sweep_dir)


class RayLauncher(EngineLauncher):
    """hydra/launcher=ray: by hydra-ray-launcher."""

    target = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"

    def settings(self, cfg: DictConfig) -> dict[str, Any]:
        found = super().settings(cfg)
        remote = found["ray"]["remote"]
        if remote["num_gpus"] is None:
            remote["num_gpus"] = cfg.trainer.devices if cfg.trainer.accelerator in GPU else 0
        return found

    def pool(self, gpus: int) -> "Ray":
        from charlm.sweep import Ray

        return Ray(self.hand_over, self.sweep_dir)


@dataclass
class Task:
    """The function that an engine calls for each job, in a process of its own."""

    script: str
    options: list[str]
    cwd: str

    def __call__(self, cfg: DictConfig) -> int:
        from charlm.sweep import work

        os.chdir(self.cwd)
        hydra = HydraConfig.get()
        GlobalHydra.instance().clear()  # a run begins its own
        return work(self.script, self.options, list(hydra.overrides.task), Path(hydra.runtime.output_dir))

"""Where Hydra looks for plugins, and accepts them from no other package: `-m` launches its jobs by charlm.sweep."""

import hashlib
import json
import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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
    from charlm.ledger import Ledger
    from charlm.sweep import Engine, Job, Pool, Ray, Slurm


GPU = ("gpu", "cuda")
ROOT = Path(__file__).parent.parent


class SweepLauncher(Launcher):
    """Keeps the ledger of a sweep, and has a pool or an engine run what is to do."""

    @abstractmethod
    def pool(self) -> "Pool | Engine": ...

    def settings(self, cfg: DictConfig) -> dict[str, Any]:
        """What one job is run with; here, what all are."""
        return {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        load = hydra_context.config_loader.load_sweep_config
        self.compose = cache(lambda given: load(config, list(given)))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from charlm.ledger import Ledger
        from charlm.sweep import Grid, names, run_jobs

        ledger = Ledger(self.sweep_dir)
        ledger.begin(list(self.config.hydra.overrides.task), None)
        ledger.content["launcher"] = self.config.hydra.runtime.choices["hydra/launcher"]
        cfgs = self.composed(job_overrides)
        min_context = self.min_context(ledger, cfgs)
        fair = [f"data.min_context={min_context}"] if min_context else []
        jobs = []
        for i, (given, name, cfg) in enumerate(zip(job_overrides, names(job_overrides), cfgs, strict=True)):
            cfg.data.min_context = min_context or cfg.data.min_context
            jobs.append(self.job(cfg, [*given, *fair], name, initial_job_idx + i, ledger.name_of))
        rows = run_jobs(Grid(jobs, ledger), ledger, self.sweep_dir, self.pool())
        returned = []
        for job in jobs:
            one = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            one.return_value = rows[job.name]["val/loss"]  # what a sweeper that searches minimises
            returned.append(one)
        return returned

    @property
    def sweep_dir(self) -> Path:
        return Path(self.config.hydra.sweep.dir).absolute()

    def composed(self, job_overrides: Sequence[Sequence[str]]) -> list[DictConfig]:
        from charlm.composition import composed

        return list(composed(job_overrides, self.compose))

    def min_context(self, ledger: "Ledger", cfgs: Sequence[DictConfig]) -> int | None:
        """As `Ledger.min_context`, for jobs whose block sizes are those of `cfgs`."""
        chosen = any(o.startswith("data.min_context=") for o in ledger.content["command"])
        return ledger.min_context([cfg.data.block_size for cfg in cfgs], chosen)

    def job(
        self, cfg: DictConfig, overrides: list[str], name: str, number: int, place: Callable[[str, str], str]
    ) -> "Job":
        """The job that `overrides` were composed to.

        Args:
            name: for hydra.sweep.subdir to use.
            place: the name of its folder, from its fingerprint and what hydra.sweep.subdir wants.
        """
        from charlm.composition import without_hydra
        from charlm.sweep import Job

        with open_dict(cfg):
            cfg.hydra.job.id, cfg.hydra.job.num = name, number
            cfg.hydra.sweep.dir = str(self.sweep_dir)
        HydraConfig.instance().cfg = cfg  # where ${hydra:...} is looked up; `set_config` would copy it first
        itself = without_hydra(cfg)
        itself.run_dir = ""  # all that the job is, wherever it is
        plain: Any = OmegaConf.to_container(itself, resolve=True)
        fingerprint = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        folder = self.sweep_dir / place(fingerprint, cfg.hydra.sweep.subdir)
        return Job.of(overrides, folder, fingerprint, plain, cfg, self.settings(cfg))


class LocalLauncher(SweepLauncher):
    """hydra/launcher=local: every job as a fresh process on this machine."""

    def __init__(
        self,
        n_jobs: Annotated[int, Ge(1)] | Literal["auto"],
        jobs_per_gpu: Annotated[int, Ge(1)],
        timeout: Annotated[float, Gt(0)] | None,
    ):
        self.limits: Any = {"n_jobs": n_jobs, "jobs_per_gpu": jobs_per_gpu, "timeout": timeout}

    def pool(self) -> "Pool":
        from charlm.sweep import Pool

        return Pool(**self.limits)


class EngineLauncher(SweepLauncher):
    """Jobs wherever another launcher of Hydra's runs them, with its settings, which may depend on what a job trains."""

    target = ""

    def __init__(self, **settings: Any):
        logging.getLogger("hydra_plugins").setLevel(logging.ERROR)  # of what the table tells better
        # Jobs take charlm from beside train.py, and not from where it is installed.
        places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, places)]))

    def settings(self, cfg: DictConfig) -> dict[str, Any]:
        found: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
        return {name: value for name, value in found.items() if name != "_target_"}

    def hand_over(self, settings: dict[str, Any], jobs: "Sequence[Job]") -> None:
        """Returns when all have ended.

        Raises:
            Exception: of the engine's own, if it does not take a job, or has lost one.
        """
        from charlm.preflight import options
        from charlm.resume import quoted

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

    def pool(self) -> "Slurm":
        import submitit

        from charlm.sweep import Slurm

        submitit.SlurmJob.watcher.update = lambda: None  # asks sacct, which not every Slurm has; `Slurm` asks squeue

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

    def pool(self) -> "Ray":
        from charlm.sweep import Ray

        return Ray(self.hand_over, self.sweep_dir)


@dataclass
class Task:
    """What an engine calls for each job, in a process of its own."""

    script: str
    options: list[str]
    cwd: str

    def __call__(self, cfg: DictConfig) -> int:
        from charlm.sweep import work

        os.chdir(self.cwd)
        hydra = HydraConfig.get()
        GlobalHydra.instance().clear()  # a run begins its own
        return work(self.script, self.options, list(hydra.overrides.task), Path(hydra.runtime.output_dir))

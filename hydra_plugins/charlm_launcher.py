"""Where Hydra looks for plugins, and accepts them from no other package: `-m` launches its jobs by charlm.sweep."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from charlm.ledger import Ledger
    from charlm.sweep import Job, Pool


@dataclass
class LocalLauncherConf:
    """hydra/launcher=local: hydra.launcher.n_jobs=4"""

    _target_: str = "hydra_plugins.charlm_launcher.LocalLauncher"
    n_jobs: Any = "auto"  # at a time; auto: a core or a GPU for each process
    jobs_per_gpu: Any = 1  # that share one
    timeout: Any = None  # minutes after which a job is taken to hang


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalLauncherConf, provider="charlm")


class LocalLauncher(Launcher):
    """Every job of a sweep as a fresh process on this machine."""

    def __init__(
        self,
        n_jobs: Annotated[int, Ge(1)] | Literal["auto"],
        jobs_per_gpu: Annotated[int, Ge(1)],
        timeout: Annotated[float, Gt(0)] | None,
    ):
        self.settings: Any = {"n_jobs": n_jobs, "jobs_per_gpu": jobs_per_gpu, "timeout": timeout}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        # Imported here, as every single run finds this file too.
        from charlm.ledger import Ledger
        from charlm.sweep import Grid, names, run_jobs

        ledger = Ledger(self.sweep_dir)
        ledger.begin(list(self.config.hydra.overrides.task), None)
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

    def pool(self) -> "Pool":
        from charlm.sweep import Pool

        return Pool(**self.settings)

    def composed(self, job_overrides: Sequence[Sequence[str]]) -> list[DictConfig]:
        from charlm.composition import composed

        return list(composed(job_overrides, partial(self.context.config_loader.load_sweep_config, self.config)))

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
        from charlm.sweep import Job

        with open_dict(cfg):
            cfg.hydra.job.id, cfg.hydra.job.num = name, number
        HydraConfig.instance().set_config(cfg)  # ${hydra:...} is looked up there
        itself = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        itself.run_dir = ""  # all that the job is, wherever it is
        plain: Any = OmegaConf.to_container(itself, resolve=True)
        fingerprint = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        folder = self.sweep_dir / place(fingerprint, cfg.hydra.sweep.subdir)
        return Job.of(overrides, folder, fingerprint, plain, cfg)

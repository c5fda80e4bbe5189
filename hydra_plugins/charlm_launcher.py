"""Where Hydra looks for plugins, and accepts them from no other package: `-m` launches its jobs by charlm.sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class LocalLauncherConf:
    """hydra/launcher=local"""

    _target_: str = "hydra_plugins.charlm_launcher.LocalLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalLauncherConf, provider="charlm")


class LocalLauncher(Launcher):
    """Every job of a sweep as a fresh process on this machine."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        # Imported here, as every single run finds this file too.
        from charlm.sweep import Job, names, run_jobs

        jobs = []
        for i, (overrides, name) in enumerate(zip(job_overrides, names(job_overrides), strict=True)):
            cfg = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.id, cfg.hydra.job.num = name, initial_job_idx + i
            HydraConfig.instance().set_config(cfg)  # ${hydra:...} is looked up there
            jobs.append(Job(list(overrides), Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir).absolute()))
        rows = run_jobs(jobs, Path(self.config.hydra.sweep.dir))
        returned = []
        for job, row in zip(jobs, rows, strict=True):
            one = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            one.return_value = row["val/loss"]  # what a sweeper that searches minimises
            returned.append(one)
        return returned

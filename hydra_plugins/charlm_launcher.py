"""Where Hydra looks for plugins, and accepts them from no other package: `-m` launches its jobs by charlm.sweep."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


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
        from charlm.composition import composed
        from charlm.ledger import Ledger
        from charlm.sweep import Job, Pool, names, run_jobs

        sweep_dir = Path(self.config.hydra.sweep.dir).absolute()
        ledger = Ledger(sweep_dir)
        ledger.content["command"] = list(self.config.hydra.overrides.task)
        jobs = []
        cfgs = list(composed(job_overrides, partial(self.context.config_loader.load_sweep_config, self.config)))
        chosen = any(o.startswith("data.min_context=") for o in ledger.content["command"])
        min_context = ledger.min_context([cfg.data.block_size for cfg in cfgs], chosen)
        fair = [f"data.min_context={min_context}"] if min_context else []
        for i, (given, name, cfg) in enumerate(zip(job_overrides, names(job_overrides), cfgs, strict=True)):
            overrides = [*given, *fair]
            with open_dict(cfg):
                cfg.hydra.job.id, cfg.hydra.job.num = name, initial_job_idx + i
            HydraConfig.instance().set_config(cfg)  # ${hydra:...} is looked up there
            cfg.data.min_context = min_context or cfg.data.min_context
            itself = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
            itself.run_dir = ""  # all that the job is, wherever it is
            plain: Any = OmegaConf.to_container(itself, resolve=True)
            fingerprint = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
            folder = sweep_dir / ledger.name_of(fingerprint, cfg.hydra.sweep.subdir)
            jobs.append(Job.of(overrides, folder, fingerprint, plain["trainer"], cfg))
        rows = run_jobs(jobs, ledger, sweep_dir, Pool(**self.settings))
        returned = []
        for job, row in zip(jobs, rows, strict=True):
            one = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            one.return_value = row["val/loss"]  # what a sweeper that searches minimises
            returned.append(one)
        return returned

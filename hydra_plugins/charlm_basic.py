"""hydra/sweeper=basic, the default: a grid of settings. Hydra looks for plugins in this package only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class GridSweeperConf:
    """hydra/sweeper=basic"""

    _target_: str = "hydra_plugins.charlm_basic.GridSweeper"
    params: Any = None  # swept settings besides those on the command line: {optimizer.lr: "1e-3,1e-2"}


ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridSweeperConf, provider="charlm")


class GridSweeper(Sweeper):
    """Launches all jobs of a grid together, so that the launcher checks every job before it writes anything."""

    def __init__(self, params: Mapping[str, str] | None):
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        from charlm.sweep.plan import grid  # not at the top, since single runs find this file too

        parser = OverridesParser.create(config_loader=self.context.config_loader)
        params = [f"{key}={value}" for key, value in self.params.items()]
        return self.launcher.launch([*grid(parser.parse_overrides([*params, *arguments]))], initial_job_idx=0)

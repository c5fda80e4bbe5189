"""hydra/sweeper=basic, the default: grids of settings. Hydra looks for plugins in this package only."""

from collections.abc import Mapping, Sequence
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
    grids: Any = None  # several grids, for settings that change together: [{model.n_embd: 32, optimizer.lr: 1e-2}, ...]


ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridSweeperConf, provider="charlm")


class GridSweeper(Sweeper):
    """Launches all jobs together, so that the launcher checks every job before it writes anything."""

    def __init__(self, params: Mapping[str, Any] | None, grids: Sequence[Mapping[str, Any]] | None = None):
        self.params, self.grids = params, grids

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        from charlm.sweep.plan import union  # not at the top, since single runs find this file too

        parser = OverridesParser.create(config_loader=self.context.config_loader)
        return self.launcher.launch(union(self.params, self.grids, arguments, parser), initial_job_idx=0)

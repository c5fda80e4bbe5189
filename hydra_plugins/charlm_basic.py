"""Where Hydra looks for plugins, and accepts them from no other package: a grid, as `-m` asks for it."""

from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser


@dataclass
class GridSweeperConf:
    """hydra/sweeper=basic, which is the default."""

    _target_: str = "hydra_plugins.charlm_basic.GridSweeper"
    params: Any = None  # what is swept, beside the command line: {optimizer.lr: "1e-3,1e-2"}


ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridSweeperConf, provider="charlm")


class GridSweeper(BasicSweeper):
    """Hydra's own, but that the launcher checks all jobs, at once and in a part of the time, before it writes."""

    def __init__(self, params: dict[str, str] | None):
        super().__init__(max_batch_size=None, params=params)

    def sweep(self, arguments: list[str]) -> Any:
        loader = self.hydra_context.config_loader  # type: ignore[union-attr]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides([*self._parse_config(), *arguments])
        [jobs] = self.split_arguments(overrides, None)
        return self.launcher.launch(jobs, initial_job_idx=0)  # type: ignore[union-attr]

"""Where Hydra looks for plugins, and accepts them from no other package: a grid, as `-m` asks for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore


@dataclass
class GridSweeperConf(BasicSweeperConf):
    """hydra/sweeper=basic, which is the default."""

    _target_: str = "hydra_plugins.charlm_basic.GridSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridSweeperConf, provider="charlm")


class GridSweeper(BasicSweeper):
    """Hydra's own, but for what charlm.preflight has done already, and faster."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Hydra composes each job once more, a tenth of a second long."""

"""Where Hydra looks for plugins, and accepts them from no other package: `hydra/sweeper=optuna` searches by Optuna."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class OptunaSweeperConf:
    """hydra/sweeper=optuna: hydra.sweeper.n_trials=50"""

    _target_: str = "hydra_plugins.charlm_optuna.OptunaSweeper"
    n_trials: Any = 30  # total number of trials; a continued search runs the missing ones
    seed: Any = "${seed}"  # seed of the suggestions
    n_startup_trials: Any = 10  # drawn at random, before TPE has something to learn from
    prune: Any = True  # end trials whose best val loss is above the median of the others at the same step
    prune_startup_trials: Any = 5  # that must have finished, and been validated at that step
    prune_warmup_steps: Any = 0  # steps before a trial may be pruned
    params: Any = (
        None  # searched settings besides those on the command line: {optimizer.lr: "tag(log,interval(1e-4,1e-1))"}
    )


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="charlm")


class OptunaSweeper(Sweeper):
    """Runs trials suggested from the results of earlier ones, by the local launcher."""

    def __init__(
        self,
        n_trials: Annotated[int, Ge(1)],
        seed: Annotated[int, Ge(0), Le(2**32 - 1)],
        n_startup_trials: Annotated[int, Ge(0)],
        prune: bool,
        prune_startup_trials: Annotated[int, Ge(1)],
        prune_warmup_steps: Annotated[int, Ge(0)],
        params: Mapping[str, str] | None,
    ):
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        # Imported here, as every single run finds this file too.
        from charlm.sweep import Job
        from charlm.sweep.ledger import Ledger
        from charlm.sweep.search import Search
        from charlm.sweep.space import Space, asked

        parser = OverridesParser.create(config_loader=self.context.config_loader)
        params = [f"{key}={value}" for key, value in self.params.items()]
        space = Space(parser.parse_overrides([*params, *arguments]))
        launcher, ledger = self.launcher, Ledger(self.launcher.sweep_dir)
        corners = launcher.composed(space.corners())
        search = asked(corners[0].hydra, space)
        ledger.begin(launcher.command, search)
        fair = launcher.fair(ledger, corners)

        def described(cfg: DictConfig, overrides: list[str], label: str, number: int, known: str | None) -> Any:
            return launcher.job(cfg, overrides, label, number, lambda fingerprint, wanted: known or wanted)

        def make(overrides: list[str], label: str, number: int, known: str | None) -> Job:
            [cfg] = launcher.composed([overrides])
            job: Job = described(cfg, overrides, label, number, known)[1](gpus)
            return job

        def check(overrides: list[str]) -> None:
            [cfg] = launcher.composed([overrides])
            launcher.check([described(cfg, overrides, "", 0, None)[0]])

        gpus = launcher.check([described(cfg, [], "", 0, None)[0] for cfg in corners])
        launcher.run(Search(search, space, fair, ledger, make, check), ledger, gpus)

"""Private names of Hydra 1.3."""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


def argument_parser(error: Callable[[str], NoReturn]) -> ArgumentParser:
    """Return the parser of Hydra's own options, with `error` called for a mistake instead of an exit."""
    parser: ArgumentParser = get_args_parser()
    parser.error = error  # type: ignore[assignment, method-assign]
    return parser


def override_dirname(overrides: Sequence[Override], naming: Any) -> str:
    """Return the value of ${hydra:job.override_dirname}, since configs are composed here without `load_configuration`.

    Args:
        naming: hydra.job.config.override_dirname.
    """
    return str(get_overrides_dirname(list(overrides), naming.exclude_keys, naming.item_sep, naming.kv_sep))


def job_callbacks(cfg: DictConfig) -> Any:
    """Return hydra.callbacks of a config, which `hydra.core.utils.run_job` takes in its context."""
    return Callbacks(cfg)

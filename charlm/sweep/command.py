"""The process of a sweep, from its command to its table."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from charlm.errors import one_line_errors
from charlm.run.folder import abandon
from charlm.sweep import processes
from charlm.sweep.plan import check_command


def sweep(argv: Sequence[str], config_dir: Path) -> NoReturn:
    """`python train.py -m ...`: check what can be checked without PyTorch, then run Hydra's sweeper and launcher. An
    error before the first job leaves nothing behind.
    """
    with one_line_errors():
        processes.start()
        try:
            sys.argv = check_command(argv, config_dir)
            hydra.main(version_base="1.3", config_path=str(config_dir.absolute()), config_name="train")(job)()
        finally:
            abandon()
            processes.stop()
    sys.exit(0)


def job(cfg: DictConfig) -> NoReturn:
    """Hydra's task function, which is never called: the launcher starts processes."""
    raise AssertionError("jobs have processes of their own")

"""The process that the jobs of a sweep are forked from: it pays for their imports once.

It imports nothing heavy itself, so that `train.py` can start the server first, and both import side by side.
"""

import multiprocessing
import os
import re
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

PRELOAD = [
    "charlm.mortal",
    "lightning",
    "charlm.callbacks",
    "charlm.evaluate",
    "charlm.logger",
    "charlm.preflight",
    "charlm.sweep",
]


def is_sweep(argv: Sequence[str]) -> bool:
    """Does a command line ask for many runs? A study, sweep=NAME, does; the jobs of it say that they are one."""
    study = any(re.match(r"\+?sweep=(?!(null)?$)", argument) for argument in argv) and "hydra.mode=RUN" not in argv
    return study or "-m" in argv or "--multirun" in argv


def start() -> ForkServerContext:
    """Start the server, if there is none yet. Returns what makes processes that it forks."""
    context = multiprocessing.get_context("forkserver")
    find()
    context.set_forkserver_preload(PRELOAD)
    ensure_running()
    return context


def find() -> None:
    """Processes of Python take charlm from beside train.py, and not from where it is installed."""
    root = str(Path(__file__).parent.parent)
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, places)])

"""Imports for all jobs of a sweep: multiprocessing imports this module once, in the process of its fork server."""

import gc
import os
import threading
from importlib import import_module

from charlm.internals.torchmetrics import import_lightning
from charlm.sweep.processes import SWEEP

NAMES = [
    "charlm.callbacks",
    "charlm.data.datamodule",
    "charlm.evaluate",
    "charlm.finish",
    "charlm.generate",
    "charlm.logger",
]
NAMES += ["charlm.module", "charlm.preflight.settings", "charlm.sweep.job", "charlm.trainer", "charlm.model.bigram"]
NAMES += ["charlm.optimizer.adamw", "charlm.scheduler"]
SECONDS_BETWEEN_LOOKS = 0.2

imported = threading.Event()


def watch(sweep: int) -> None:
    """Exit at once if the sweep ends first, because the server checks only after its imports."""
    while not imported.wait(SECONDS_BETWEEN_LOOKS):
        if os.getppid() != sweep:
            os._exit(0)


watcher = threading.Thread(target=watch, args=(int(os.environ.pop(SWEEP, os.getppid())),), daemon=True)
watcher.start()
gc.disable()  # imports make a million objects and no garbage
import_lightning()
for name in NAMES:
    import_module(name)
import_module("charlm.run.record").environment()  # the same for all jobs, as they run the code that is loaded here
gc.freeze()  # forked processes share the memory of these objects
gc.enable()
imported.set()
watcher.join()  # forked processes have no threads

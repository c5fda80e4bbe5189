"""What this machine can do, what GPUs, clusters and compilation still need, and how to get it."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from charlm import __version__
from charlm.devices import cuda_problem, triton_problem
from charlm.home import cache
from charlm.system import memory, posix

PACKAGES = ("torch", "lightning", "hydra-core", "tensorboard", "numpy")
LITTLE = 2 * 2**30  # bytes of disk that a sweep fills


class Finding(NamedTuple):
    """One line of the report.

    Args:
        ready: True: it works; False: it is missing, and `text` says how to get it; None: a fact.
    """

    name: str
    text: str
    ready: bool | None = None


def examine(outputs: Path) -> Iterator[Finding]:
    """Yield facts about the machine, then what can be used and what is missing.

    Args:
        outputs: where runs are kept.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Finding("charlm", f"{__version__}, {versions}")
    yield Finding("Python", f"{platform.python_version()} on {platform.system()}, {platform.machine()}")
    limit = memory.limit()
    kept = f", {memory.size(limit[0])} of memory" if limit else ""
    yield Finding("CPU", f"{posix.cores()} cores{kept}; trainer.accelerator=cpu", True)
    yield disk("outputs", outputs)
    yield disk("cache", cache())
    yield gpu()
    yield bf16()
    yield compiler()
    yield package("Slurm", "hydra_plugins.hydra_submitit_launcher", "slurm", "hydra/launcher=slurm", "sbatch")
    yield package("Ray", "hydra_plugins.hydra_ray_launcher", "ray", "hydra/launcher=ray")
    yield package("play", "starlette", "play", "charlm play")


def disk(name: str, folder: Path) -> Finding:
    """Return the room where a folder is or will be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    room = shutil.disk_usage(there).free
    text = f"{folder}: {memory.size(room)} free"
    if room < LITTLE:
        return Finding(name, f"{text}, which is little: remove old runs, or charlm data --prune", False)
    writable = os.access(there, os.W_OK)
    return Finding(
        name, text if writable else f"{there} cannot be written: choose another with hydra.run.dir=", writable
    )


def gpu() -> Finding:
    problem = cuda_problem()
    if problem is None:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", f"{', '.join(names)}; trainer.accelerator=gpu", True)
    if torch.backends.mps.is_available():
        return Finding("GPU", "an Apple GPU; trainer.accelerator=mps, with results that differ from run to run", True)
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return Finding("GPU", f"{problem}: install PyTorch's CUDA build, as https://pytorch.org says", False)
    return Finding("GPU", f"{problem}: it needs one, and its driver (nvidia-smi lists it)", False)


def bf16() -> Finding:
    how = "trainer.precision=bf16-mixed"
    if cuda_problem() is None:
        major, minor = torch.cuda.get_device_capability()
        fast = major >= 8
        text = f"{how}" if fast else f"this GPU (compute capability {major}.{minor}) has none: precision=16-mixed"
        return Finding("bf16", text, fast)
    return Finding("bf16", f"{how} works on the CPU, and is rarely faster there than 32-true", True)


def compiler() -> Finding:
    problem = triton_problem()
    if problem:
        return Finding("compile", f"compile=true needs {problem}", False)
    return Finding("compile", "compile=true", True)


def package(name: str, module: str, extra: str, how: str, program: str = "") -> Finding:
    """Return whether an extra of charlm, and a program that it needs, are installed."""
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        return Finding(name, f"{how} needs pip install 'charlm[{extra}]'", False)
    if program and not shutil.which(program):
        return Finding(name, f"{how} needs {program}, on a machine of the cluster", False)
    return Finding(name, how, True)

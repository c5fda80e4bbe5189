"""The device of a run: an NVIDIA GPU if one works, else the CPU."""

import os
import re
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from charlm.errors import one_line


@cache
def cuda_problem() -> str | None:
    """Return why no NVIDIA GPU can be used; None if one can.

    A GPU in the driver's list is not enough: with a driver that is too old, the first tensor fails. So this computes
    with one, on the GPU of this process.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU on this machine"
    number = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) % gpus
    try:
        torch.ones(2, device=f"cuda:{number}").sum().item()
    except (AssertionError, RuntimeError) as error:  # the former from a PyTorch that was built without CUDA
        return re.split(r"\. |\.$", one_line(error))[0]
    return None


def broken_gpu() -> str | None:
    """Return why a GPU that the driver lists cannot be used; None if there is none, or if it works."""
    return cuda_problem() if torch.cuda.device_count() else None


def accelerator_of(accelerator: str) -> str:
    """Resolve `trainer.accelerator` to cpu, cuda or mps.

    `auto` is never an Apple GPU (mps), on which the gradient of an embedding is not deterministic.
    """
    if accelerator == "auto":
        return "cpu" if cuda_problem() else "cuda"
    if accelerator == "gpu":
        return "mps" if torch.backends.mps.is_available() and not torch.cuda.device_count() else "cuda"
    return accelerator


def triton_problem() -> str | None:
    """Return why Triton, which compiles for NVIDIA GPUs, cannot build its launcher; None if it can."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "a C compiler: install one (gcc or clang)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"the headers of Python ({header}): install them (such as python3-dev)"
    return None


def make_deterministic() -> None:
    """Make the same computation give the same bits, as a Trainer does with deterministic=True."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # PyTorch would also fill all new memory, which costs a tenth of a GPT's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

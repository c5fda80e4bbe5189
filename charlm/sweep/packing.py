"""The jobs of a sweep that train together in one process: one model, and other seeds or settings of the optimization.

Bigrams on a CPU are bitwise what they would be alone. GPTs are so within rounding, and train together only if
hydra.launcher.pack is a number (tests/test_pack.py).
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from charlm.sweep.job import Job, has_begun
from charlm.system import posix

# Settings in which the runs of a pack may differ, besides their folders.
FREE = ("seed", "run_dir", "data.seed", "optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "optimizer.eps")
FREE_GROUPS = ("scheduler", "callbacks", "logger")
# What a pack has no steps for. `charlm.speed.pack.fits` looks at the trainer itself, before the first step.
NEEDED: dict[str, tuple[Any, ...]] = {
    "optimizer._target_": ("charlm.optimizer.adamw.adamw",),
    "speed._target_": ("charlm.speed.GroupedSteps",),
    "speed.cuda_graph": (False,),
    "threads": ("auto", 1),
    "compile": (False,),
    "init_from": (None,),
    "stop_at": (None,),
    "trainer.devices": ("auto", 1, "1"),
    "trainer.max_time": (None,),
    "trainer.accumulate_grad_batches": (1,),
}
BIGRAM: dict[str, tuple[Any, ...]] = {
    "model._target_": ("charlm.model.bigram.Bigram",),
    "trainer.precision": ("auto", "32-true"),
    "trainer.gradient_clip_val": (None,),
}
GPT: dict[str, tuple[Any, ...]] = {
    "model._target_": ("charlm.model.gpt.GPT",),
    "model.dropout": (0,),
    "model.checkpointing": (False,),
    "trainer.precision": ("auto", "32-true", "bf16-mixed"),
}
OBSERVERS = {"Attention", "BigramTable", "Checkpoint", "Progress", "Samples", "TensorBoard", "CSV"}
MOST = 64  # jobs in a process
PER_CORE = 2  # packs at a time, since each waits for the disk now and then
FEWEST = 4  # jobs in a pack, before there are several packs for a core


def kind_of(run: dict[str, Any], on_gpu: bool, chdir: bool, rounding: bool) -> str | None:
    """Return what the jobs of a pack have in common; None for a job that trains alone.

    Args:
        run: a resolved config.
        on_gpu: whether it trains on a GPU.
        chdir: whether the job changes its working directory, of which a process has one.
        rounding: whether its results may differ by rounding from those that it has alone.
    """
    observers = [*run["callbacks"].values(), *run["logger"].values()]
    own = any(not is_charlm(observer["_target_"]) for observer in observers)
    known = (has(run, BIGRAM) and not on_gpu) or (has(run, GPT) and rounding)
    if chdir or own or not known or not has(run, NEEDED):
        return None
    shared = copy.deepcopy({name: value for name, value in run.items() if name not in FREE_GROUPS})
    for name in FREE:
        *groups, last = name.split(".")
        (at(shared, ".".join(groups)) if groups else shared).pop(last, None)
    return json.dumps(shared, sort_keys=True)


def has(run: dict[str, Any], settings: dict[str, tuple[Any, ...]]) -> bool:
    """Return whether each of these settings has one of the given values."""
    return all(at(run, name) in values for name, values in settings.items())


def is_charlm(target: str) -> bool:
    """Return whether a callback or logger is one that a pack knows."""
    package, _, name = target.rpartition(".")
    return package in ("charlm.callbacks", "charlm.logger") and name in OBSERVERS


def at(run: dict[str, Any], name: str) -> Any:
    """Return the setting with a dotted name; None if there is none."""
    node: Any = run
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def packed(jobs: Sequence[Job], pack: int | Literal["auto"], n_jobs: int | Literal["auto"]) -> list[Job]:
    """Return the first job of each pack, with the others of it, and the jobs that train alone.

    Args:
        pack: jobs in a pack at most; "auto": as many as give each process an equal share of all jobs.
        n_jobs: processes that run at a time; "auto": one for each core, or PER_CORE.
    """
    size = min(MOST, share(len(jobs), n_jobs)) if pack == "auto" else pack
    kinds: dict[str | int, list[Job]] = {}
    for number, job in enumerate(jobs):
        alone = job.kind is None or has_begun(job.folder)  # a job that has begun is resumed, alone
        kinds.setdefault(number if alone or not job.kind else job.kind, []).append(job)
    packs = [alike[i : i + size] for alike in kinds.values() for i in range(0, len(alike), size)]
    return [replace(first, others=tuple(others)) for first, *others in packs]


def share(jobs: int, n_jobs: int | Literal["auto"]) -> int:
    """Return the number of jobs for each of the processes that run at a time."""
    if n_jobs != "auto":
        return -(-jobs // n_jobs)
    of_core = -(-jobs // posix.cores())
    return of_core if of_core < PER_CORE * FEWEST else -(-of_core // PER_CORE)

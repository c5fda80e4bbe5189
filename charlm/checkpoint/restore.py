"""Check the training state of a checkpoint against the new trainer before Lightning restores it.

Lightning and torch accept state of any shape and fail later, at a step that uses it.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from charlm.errors import InputError, out_of_memory, printable
from charlm.internals.lightning import RESTORING
from charlm.optimizer.muon import Several

MOST_COUNTED = 2**48  # of any count
OURS = ("charlm.", "lightning.", "torch.")  # packages whose callbacks and schedulers keep the shape of their state
CHANGING = ("capturable", "lr")  # settings of an optimizer that CUDA graphs and schedules change


class Mismatch(Exception):
    """The first difference between recorded and new state, with its place in the file."""


def damaged(path: Any, why: str) -> InputError:
    run = Path(path).parent.parent
    return InputError(
        f"{path}: its training state is damaged or of another version ({printable(why, 300)}): remove it to go on from "
        f"previous.ckpt, or begin again with rerun={run}"
    )


def check_progress(trainer: L.Trainer, content: dict[str, Any], path: Any) -> None:
    """Check recorded loops and callbacks against those of a trainer.

    Raises:
        InputError: if keys or types differ.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    try:
        compare(trainer.fit_loop.state_dict(), content["loops"]["fit_loop"], "loops.fit_loop", exact=True)
        for callback in callbacks:
            key = callback.state_key
            if type(callback).__module__.startswith(OURS) and key in content["callbacks"]:
                compare(callback.state_dict(), content["callbacks"][key], f"callbacks.{key}")
    except (Mismatch, LookupError, TypeError) as error:
        raise damaged(path, str(error)) from None


def check_optimizers(trainer: L.Trainer, content: dict[str, Any], path: Any) -> None:
    """Check recorded optimizers and schedules against those of a trainer.

    Raises:
        InputError: if keys, types or shapes differ.
    """
    sharded = [*trainer.lightning_module.parameters()] if isinstance(trainer.strategy, ModelParallelStrategy) else []
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    try:
        compare([None] * len(trainer.optimizers), content["optimizer_states"], "optimizer_states")
        for number, optimizer in enumerate(trainer.optimizers):
            # Sharded states number parameters in the order of the model, others in the order of the optimizer.
            numbered = sharded or [p for group in optimizer.param_groups for p in group["params"]]
            check_optimizer(optimizer, content["optimizer_states"][number], f"optimizer_states.{number}", numbered)
        known = [s.state_dict() if type(s).__module__.startswith(OURS) else {} for s in schedulers]
        compare(known, content["lr_schedulers"], "lr_schedulers")
    except (Mismatch, LookupError, TypeError) as error:
        raise damaged(path, str(error)) from None


def check_optimizer(optimizer: Optimizer, recorded: Any, place: str, order: Sequence[Tensor]) -> None:
    """Check the recorded state of one optimizer, whose parameters are numbered in `order`.

    Raises:
        Mismatch: at the first difference.
    """
    groups, index_of = optimizer.param_groups, {id(p): index for index, p in enumerate(order)}
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    compare({"state": {}, "param_groups": settings}, recorded, place)
    of_index: dict[int, tuple[int, Tensor]] = {}
    for number, (group, found) in enumerate(zip(groups, recorded["param_groups"], strict=True)):
        for key, value in group.items():
            fixed = isinstance(value, str | int | None) and key not in CHANGING
            if fixed and (type(found[key]) is not type(value) or found[key] != value):
                raise Mismatch(f"{place}.param_groups.{number}.{key} is not {value}")
        mine = {index_of[id(p)]: (number, p) for p in group["params"]}
        if [*map(repr, found["params"])] != [*map(repr, mine)]:
            raise Mismatch(f"{place}.param_groups.{number}.params names other parameters")
        of_index |= mine
    expected: dict[Any, dict[str, Any] | None] = {}  # keys: group, shape, dtype
    for index, state in recorded["state"].items():
        if type(index) is not int or index not in of_index:
            raise Mismatch(f"{place}.state is for parameter {index!r}, which does not exist")
        number, parameter = of_index[index]
        kind = (number, parameter.shape, parameter.dtype)
        expected[kind] = expected[kind] if kind in expected else slots(optimizer, number, parameter)
        wanted = expected[kind]
        compare(wanted, state, f"{place}.state.{index}")
        if wanted is not None and (more := state.keys() - wanted.keys()):
            raise Mismatch(f"{place}.state.{index}.{min(map(str, more))} is nothing that this optimizer keeps")
    if not recorded["state"] and slots(optimizer, *next(iter(of_index.values()))):
        raise Mismatch(f"{place}.state is empty")


@torch.no_grad()
def slots(optimizer: Optimizer, number: int, parameter: Tensor) -> dict[str, Any] | None:
    """Return the state that an optimizer keeps for a parameter of a group: a copy takes a step on zeros, on the CPU.

    Returns None for an optimizer that cannot, such as L-BFGS, which needs a closure.
    """
    if isinstance(optimizer, Several):
        for inner in optimizer.optimizers:
            if number < len(inner.param_groups):
                return slots(inner, number, parameter)
            number -= len(inner.param_groups)
    zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, requires_grad=True)
    zeros.grad = torch.zeros_like(zeros)
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[number], "params": [zeros], "lr": 0.0, "capturable": False}]
    try:
        probe.step()
    except Exception:  # a setting of the user's own optimizer
        return None
    return dict(probe.state[zeros])


def compare(fresh: Any, recorded: Any, place: str, exact: bool = False) -> None:
    """Check recorded state against new state: the same keys, lengths, shapes and types.

    Values that are empty or None in the fresh state may have any content. Extra keys are allowed, as of a stateful
    DataLoader.

    Args:
        exact: numbers are counts, from 0 up; otherwise they may have another type.

    Raises:
        Mismatch: at the first difference.
    """
    if fresh is None:
        return
    number = type(fresh) in (int, float)
    if isinstance(fresh, Tensor) or (number and not exact and isinstance(recorded, Tensor)):
        shape = fresh.shape if isinstance(fresh, Tensor) else ()
        if not isinstance(recorded, Tensor) or recorded.shape != shape or not recorded.is_floating_point():
            raise Mismatch(f"{place} is not a tensor of shape {list(shape)}")
    elif number:
        if type(recorded) not in ((type(fresh),) if exact else (int, float)) or recorded != recorded:
            raise Mismatch(f"{place} is not a number of type {type(fresh).__name__}")
        if type(recorded) is int and not (0 if exact else -MOST_COUNTED) <= recorded <= MOST_COUNTED:
            raise Mismatch(f"{place} is out of range")
    elif type(recorded) not in like(fresh):
        raise Mismatch(f"{place} is not of type {type(fresh).__name__}")
    elif isinstance(fresh, dict):
        for key, value in fresh.items():
            if key not in recorded:
                raise Mismatch(f"{place}.{key} is missing")
            compare(value, recorded[key], f"{place}.{key}", exact)
    elif isinstance(fresh, list | tuple) and fresh:
        if len(recorded) != len(fresh):
            raise Mismatch(f"{place} has {len(recorded)} parts where {len(fresh)} are needed")
        for i, (value, found) in enumerate(zip(fresh, recorded, strict=True)):
            compare(value, found, f"{place}.{i}", exact)


def like(fresh: Any) -> tuple[type, ...]:
    """Return the types of recorded state. Files keep no subclass of dict; torch turns some tuples to lists."""
    return (dict,) if isinstance(fresh, dict) else (list, tuple) if isinstance(fresh, list | tuple) else (type(fresh),)


def failed_to_restore(error: BaseException) -> bool:
    """Return whether an error comes from Lightning's restoring of a state, and not from a mistake that has its line."""
    if not isinstance(error, Exception) or isinstance(error, InputError) or out_of_memory(error):
        return False
    step = error.__traceback__
    while step:
        frame = step.tb_frame
        if RESTORING.get(frame.f_globals.get("__name__", ""), " ") in frame.f_code.co_name:
            return True
        step = step.tb_next
    return False

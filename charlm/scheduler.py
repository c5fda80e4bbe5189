"""Learning-rate schedules: an optimizer and a budget in, a `torch.optim.lr_scheduler.LRScheduler` out.

Stepped once a step. Each is a factor of the learning rate. It rises over `warmup_steps` steps, always counted in
steps, since it is optimizer states that must warm up, and falls as the budget is spent, be that by steps or by the
clock. The lower of both counts: at the end of the budget there is nothing left to warm up for.
"""

from collections.abc import Callable
from math import cos, pi, sqrt
from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from charlm.budget import Budget

Steps = Annotated[int, Ge(0)]
Part = Annotated[float, Ge(0), Le(1)]


def constant(optimizer: Optimizer, budget: Budget) -> LRScheduler | None:
    """The learning rate stays as it is; there is nothing to step."""
    return None


def warmup_cosine(optimizer: Optimizer, budget: Budget, warmup_steps: Steps, min_lr_ratio: Part) -> LRScheduler:
    """Half a cosine down to `min_lr_ratio` times the rate (Loshchilov and Hutter 2017); in steps, nanoGPT's."""

    def fall(step: int) -> float:
        return 0.5 * (1 + cos(pi * budget.spent(step, since=warmup_steps)))

    return scheduled(optimizer, budget, warmup_steps, min_lr_ratio, fall)


def linear(optimizer: Optimizer, budget: Budget, warmup_steps: Steps, min_lr_ratio: Part) -> LRScheduler:
    """A straight line down to `min_lr_ratio` times the rate (Defazio et al. 2023)."""

    def fall(step: int) -> float:
        return 1 - budget.spent(step, since=warmup_steps)

    return scheduled(optimizer, budget, warmup_steps, min_lr_ratio, fall)


def warmup_stable_decay(
    optimizer: Optimizer,
    budget: Budget,
    warmup_steps: Steps,
    decay_fraction: Annotated[float, Gt(0), Le(1)],
    min_lr_ratio: Part,
) -> LRScheduler:
    """The full rate until the last part of the budget, then down as 1 - sqrt (Hu et al. 2024; Hägele et al. 2024)."""

    def fall(step: int) -> float:
        left = 1 - budget.spent(step)
        return 1 - sqrt(1 - min(1.0, left / decay_fraction))

    return scheduled(optimizer, budget, warmup_steps, min_lr_ratio, fall)


def scheduled(
    optimizer: Optimizer, budget: Budget, warmup_steps: int, min_lr_ratio: float, fall: Callable[[int], float]
) -> LRScheduler:
    """A warm-up, and `fall` from 1 to 0 brought between 1 and `min_lr_ratio`.

    Raises:
        ValueError: if the warm-up takes all steps.
    """
    if budget.steps is not None and warmup_steps >= budget.steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} leaves nothing of a run of {budget.steps} steps: "
            f"choose fewer, or a longer run"
        )
    known: dict[int, float] = {}  # cache of the newest step, so that all parameter groups read the clock once

    def factor(step: int) -> float:
        if step not in known:
            risen = (step + 1) / (warmup_steps + 1)  # never zero, as a step that changes nothing is wasted
            known.clear()
            known[step] = min(risen, min_lr_ratio + (1 - min_lr_ratio) * fall(step))
        return known[step]

    # LambdaLR leaves a function out of its state, which stays plain numbers; a resumed run creates it again.
    return LambdaLR(optimizer, factor)

"""Learning-rate schedules: an optimizer and a budget in, a `torch.optim.lr_scheduler.LRScheduler` out.

Each schedule multiplies the learning rate by a factor once per optimizer step. The factor rises over `warmup_steps`
steps and falls as the budget is spent, in steps or in time; the lower of the two applies. The warm-up is always counted
in steps, because the optimizer's averages need steps to settle.
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
    """Keep the learning rate constant."""
    return None


def warmup_cosine(optimizer: Optimizer, budget: Budget, warmup_steps: Steps, min_lr_ratio: Part) -> LRScheduler:
    """Decay along half a cosine (Loshchilov and Hutter 2017); counted in steps, nanoGPT's schedule.

    Args:
        optimizer: the optimizer whose rates change.
        budget: steps or time of the whole run.
        warmup_steps: steps over which the learning rate rises from zero.
        min_lr_ratio: learning rate at the end, as a fraction of optimizer.lr.
    """

    def fall(step: int) -> float:
        return 0.5 * (1 + cos(pi * budget.spent(step, since=warmup_steps)))

    return scheduled(optimizer, budget, warmup_steps, min_lr_ratio, fall)


def linear(optimizer: Optimizer, budget: Budget, warmup_steps: Steps, min_lr_ratio: Part) -> LRScheduler:
    """Decay linearly (Defazio et al. 2023).

    Args:
        optimizer: the optimizer whose rates change.
        budget: steps or time of the whole run.
        warmup_steps: steps over which the learning rate rises from zero.
        min_lr_ratio: learning rate at the end, as a fraction of optimizer.lr.
    """

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
    """Keep the full rate, then decay as 1 - sqrt (Hu et al. 2024; Hägele et al. 2024).

    Args:
        optimizer: the optimizer whose rates change.
        budget: steps or time of the whole run.
        warmup_steps: steps over which the learning rate rises from zero.
        decay_fraction: fraction of the budget, at its end, in which the learning rate decays.
        min_lr_ratio: learning rate at the end, as a fraction of optimizer.lr.
    """

    def fall(step: int) -> float:
        left = 1 - budget.spent(step)
        return 1 - sqrt(1 - min(1.0, left / decay_fraction))

    return scheduled(optimizer, budget, warmup_steps, min_lr_ratio, fall)


def scheduled(
    optimizer: Optimizer, budget: Budget, warmup_steps: int, min_lr_ratio: float, fall: Callable[[int], float]
) -> LRScheduler:
    """Return the schedule of a warm-up and of `fall`, which goes from 1 to 0, scaled to end at `min_lr_ratio`.

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

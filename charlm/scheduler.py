"""Learning-rate schedules: an optimizer and a budget in, a `torch.optim.lr_scheduler.LRScheduler` out.

Stepped once a step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Budget:
    """What ends a run, whichever comes first.

    Args:
        steps: optimizer steps, if they end it; tokens are counted as the steps that they take.
        seconds: of training, if the clock ends it.
        clock: tells how many seconds have passed.
    """

    steps: int | None
    seconds: float | None = None
    clock: Callable[[], float] = lambda: 0.0

    def spent(self, step: int) -> float:
        """The part that is gone after `step` steps, 0 to 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = self.clock() / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_clock))


def constant(optimizer: torch.optim.Optimizer, budget: Budget) -> LRScheduler | None:
    """The learning rate stays as it is; there is nothing to step."""
    return None

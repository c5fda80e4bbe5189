"""Learning-rate schedules: an optimizer in, a `torch.optim.lr_scheduler.LRScheduler` out, stepped once a step."""

import torch
from torch.optim.lr_scheduler import LRScheduler


def constant(optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    """The learning rate stays as it is; there is nothing to step."""
    return None

"""Base class of callbacks that allow several optimizer steps between two calls."""

from collections.abc import Sequence

import lightning as L
from torch import Tensor


class AtSteps(L.Callback):
    """A callback whose batch hooks are needed at some steps only. A class that derives from it directly promises that.

    The grouped steps of `charlm.speed` end at each multiple of `every_n_steps`, which Lightning takes with all of its
    hooks; with None, a group may end at any step. The hooks here report the grouped steps. Without grouped steps
    Lightning calls the batch hooks at each batch, and none of these.
    """

    every_n_steps: int | None = None

    def before_steps(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called before grouped steps."""

    def after_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, losses: Sequence[Tensor]) -> None:
        """Called after grouped steps, with the loss of each."""

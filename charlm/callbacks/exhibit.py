"""Something for a person to look at on the dashboard."""

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from charlm.logger import TensorBoard
from charlm.module import NoStepHooks


class Exhibit(NoStepHooks, L.Callback):
    """Shown before the first step, after every validation and after the last step: once for each of these steps.

    Nothing is computed where there is no TensorBoard to show it.
    """

    shown_at = -1

    def show(self, trainer: L.Trainer, pl_module: L.LightningModule, board: TensorBoard) -> None:
        """Put it on the dashboard, as of `trainer.global_step`."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer, pl_module)

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loggers: list[Logger] = trainer.loggers
        boards = [logger for logger in loggers if isinstance(logger, TensorBoard)]
        if not boards or not trainer.is_global_zero or self.shown_at == trainer.global_step:
            return
        self.shown_at = trainer.global_step
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()  # without dropout, which would also take from the randomness of training
        with torch.no_grad():
            self.show(trainer, pl_module, boards[0])
        for module, mode in modes.items():
            module.training = mode

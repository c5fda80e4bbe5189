"""Base class of callbacks that show something on the dashboard."""

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from charlm.logger import TensorBoard
from charlm.module import LanguageModel


class DashboardCallback(L.Callback):
    """Calls `show` before the first step, after every validation and after the last step, at most once per step.
    Without TensorBoard nothing is computed.
    """

    shown_at = -1

    def show(self, trainer: L.Trainer, model: nn.Module, board: TensorBoard) -> None:
        """Show something about the model, at `trainer.global_step`."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if trainer.global_step == 0:  # not if the run was resumed
            self.look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not trainer.sanity_checking:
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        self.look(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """A run may have several callbacks of one class with different settings."""
        settings = {k: v for k, v in vars(self).items() if isinstance(v, int | str) and k != "shown_at"}
        return self._generate_state_key(**settings)

    def state_dict(self) -> dict[str, int]:
        return {"shown_at": self.shown_at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.shown_at = state_dict["shown_at"]

    def look(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        loggers: list[Logger] = trainer.loggers
        boards = [logger for logger in loggers if isinstance(logger, TensorBoard)]
        if not boards or self.shown_at == trainer.global_step:
            return
        self.shown_at = trainer.global_step
        model = pl_module.unsharded_model()
        if not trainer.is_global_zero:
            return
        modes = {module: module.training for module in model.modules()}
        model.eval()  # without dropout, which would change the random draws of training
        with torch.inference_mode():
            self.show(trainer, model, boards[0])
        for module, mode in modes.items():
            module.training = mode

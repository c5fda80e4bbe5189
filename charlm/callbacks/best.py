"""Keeps the checkpoint with the lowest validation loss."""

import math
from pathlib import Path
from typing import Any

import lightning as L

from charlm.callbacks.checkpoint import save
from charlm.checkpoint import BEST


class Best(L.Callback):
    """Saves the checkpoint with the lowest val/loss of all validations to `dirpath`/best.ckpt."""

    def __init__(self, dirpath: str):
        self.path = Path(dirpath, BEST)
        self.loss = math.inf
        self.step: int | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.loss:  # which NaN is not
            self.loss, self.step = loss, trainer.global_step
            save(trainer, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss, self.step = state_dict["loss"], state_dict["step"]

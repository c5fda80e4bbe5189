"""Checkpoints of a run: at a steady pace and at its end, each whole or not there."""

from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from charlm.checkpoint import NAME, read, write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's files, written beside the target and renamed: a kill or a full disk costs only the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read(Path(path))


def validates_now(trainer: L.Trainer) -> bool:
    """Does a validation follow this step? A state saved before it would resume after it, and leave it out."""
    every: Any = trainer.val_check_batch
    return trainer.enable_validation and trainer.global_step % every == 0


class Checkpoint(L.Callback):
    """Keeps the newest state of the run in `dirpath`/last.ckpt, the first before the first step.

    It has to come after the other observers, whose state and logs are then those of the same step.

    Args:
        every_n_steps: how often, in optimizer steps; the end of training saves as well.
    """

    def __init__(self, dirpath: str, every_n_steps: Annotated[int, Ge(1)] = 1000):
        self.path = Path(dirpath, NAME)
        self.every_n_steps = every_n_steps
        self.saved_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.ckpt_path:  # before anything is told of the first step
            self.save(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        if not validates_now(trainer):
            self.save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_if_due(trainer)

    def save_if_due(self, trainer: L.Trainer) -> None:
        at_its_end = trainer.global_step >= trainer.max_steps > 0  # what others do there comes before
        if trainer.global_step % self.every_n_steps == 0 and not at_its_end:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self.saved_at:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:  # a run that resumes here finds what was told up to here
            logger.save()
        trainer.save_checkpoint(self.path)
        self.saved_at = trainer.global_step

"""Checkpoints of a run: at a steady pace and at its end, each whole or not there."""

from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from charlm.checkpoint import NAME, write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's files, written beside the target and renamed: a kill or a full disk costs only the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomically(path, lambda file: torch.save(checkpoint, file))


class Checkpoint(L.Callback):
    """Keeps the newest state of the run in `dirpath`/last.ckpt.

    Args:
        every_n_steps: how often, in optimizer steps; the end of training saves as well.
    """

    def __init__(self, dirpath: str, every_n_steps: Annotated[int, Ge(1)] = 1000):
        self.path = Path(dirpath, NAME)
        self.every_n_steps = every_n_steps
        self.saved_at = 0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self.saved_at:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved_at = trainer.global_step

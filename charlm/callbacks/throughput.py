"""Tokens per second of the training loop, over all processes; the time of validations does not count."""

import time
from typing import Any

import lightning as L
from torch import Tensor


class Throughput(L.Callback):
    """Logs `train/tokens_per_second` as often as the trainer logs; `tokens` and `seconds` are of the whole run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.every = trainer.log_every_n_steps * trainer.accumulate_grad_batches
        self.batches = self.tokens = 0
        self.start = self.since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        tokens = batch[0].numel() * trainer.world_size
        self.batches += 1
        self.tokens += tokens
        if self.batches % self.every == 0:
            now = time.perf_counter()
            pl_module.log("train/tokens_per_second", self.every * tokens / (now - self.since))
            self.since = now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pause = time.perf_counter() - self.paused
        self.start += pause
        self.since += pause

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

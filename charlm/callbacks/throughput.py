"""Tokens per second of the training loop, over all processes, without the time of validations and exhibits."""

import time
from typing import Any

import lightning as L
from torch import Tensor

from charlm.module import NoStepHooks


class Throughput(NoStepHooks, L.Callback):
    """Logs `train/tokens_per_second` as often as the trainer logs; `tokens` and `seconds` are of the whole run.

    It has to be the last of the callbacks, so that its clock starts after what the others do before a step.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        settings: Any = trainer
        self.every = settings.log_every_n_steps * settings.accumulate_grad_batches
        self.batches = self.tokens = 0
        self.start = self.since = self.end = time.perf_counter()

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
        self.end = time.perf_counter()
        if self.batches % self.every == 0:
            rate = self.every * tokens / (self.end - self.since)
            for logger in trainer.loggers:
                logger.log_metrics({"train/tokens_per_second": rate}, trainer.global_step)
            self.since = self.end

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pause = time.perf_counter() - self.paused
        self.start += pause
        self.since += pause
        self.end += pause

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

"""Tokens per second of the training loop, over all processes, without the time of validations and exhibits."""

import time
from typing import Any

import lightning as L
from torch import Tensor

from charlm.callbacks.at_steps import AtSteps


class Throughput(AtSteps):
    """Logs `train/tokens_per_second` as often as the trainer logs; `tokens` and `seconds` are of the whole run.

    It has to be the last of the callbacks, so that its clock starts after what the others do before a step.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.start = self.end = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_then = trainer.global_step
        self.since = time.perf_counter()
        self.start, self.end = self.since - self.seconds, self.since  # after those before it was resumed

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        settings: Any = trainer
        step, tokens_per_step = trainer.global_step, batch[0].numel() * trainer.world_size
        tokens_per_step *= settings.accumulate_grad_batches
        self.tokens = step * tokens_per_step
        self.end = time.perf_counter()
        if step % settings.log_every_n_steps == 0 and step > self.step_then:
            rate = (step - self.step_then) * tokens_per_step / (self.end - self.since)
            pl_module.log("train/tokens_per_second", rate)
            self.since, self.step_then = self.end, step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:  # before training, and its clock
            return
        pause = time.perf_counter() - self.paused
        self.start += pause
        self.since += pause
        self.end += pause

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.start, self.end = state_dict["tokens"], 0.0, state_dict["seconds"]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

"""Tokens per second of the training loop, over all processes, without the time of validations."""

import time
from typing import Any

import lightning as L
from torch import Tensor


class Clock:
    """Logs `train/tokens_per_second` as often as the trainer logs; `tokens` and `seconds` count the whole run."""

    def __init__(self) -> None:
        self.tokens = 0
        self.began = self.ended = 0.0

    def start(self, trainer: L.Trainer) -> None:
        self.logged_step = trainer.global_step
        self.logged_at = time.perf_counter()
        self.began, self.ended = self.logged_at - self.seconds, self.logged_at  # add the time before a resume

    def end_step(self, trainer: Any, module: L.LightningModule, batch: tuple[Tensor, Tensor]) -> None:
        step = trainer.global_step
        tokens_per_step = batch[0].numel() * trainer.world_size * trainer.accumulate_grad_batches
        self.tokens = step * tokens_per_step
        self.ended = time.perf_counter()
        if step % trainer.log_every_n_steps == 0 and step > self.logged_step:
            rate = (step - self.logged_step) * tokens_per_step / (self.ended - self.logged_at)
            module.log("train/tokens_per_second", rate)
            self.logged_at, self.logged_step = self.ended, step

    def pause(self) -> None:
        self.paused = time.perf_counter()

    def resume(self) -> None:
        pause = time.perf_counter() - self.paused
        self.began += pause
        self.logged_at += pause
        self.ended += pause

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.began, self.ended = state_dict["tokens"], 0.0, state_dict["seconds"]

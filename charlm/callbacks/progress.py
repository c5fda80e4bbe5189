"""How far training is: a bar on a terminal, else a plain line every few seconds."""

import time
from typing import Annotated, Any

import lightning as L
from annotated_types import Gt
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from charlm.terminal import console

# A person reads no faster, and every look at the loss waits for the device.
SECONDS_BETWEEN_LOOKS = 0.25


class Progress(L.Callback):
    """Shows step, loss, speed, the last validation and the time left.

    Args:
        seconds_between_lines: where the output is not a terminal.
    """

    def __init__(self, seconds_between_lines: Annotated[float, Gt(0)] = 5.0):
        self.pace = SECONDS_BETWEEN_LOOKS if console.is_terminal else seconds_between_lines
        self.bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()
        self.first_step = trainer.global_step
        self.next_look = self.start + self.pace if trainer.is_global_zero else float("inf")
        if trainer.is_global_zero and console.is_terminal:
            columns = (TextColumn("[bold]step[/] {task.fields[steps]}"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=8)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.task = self.bar.add_task("", total=total, completed=self.first_step, steps="")
            self.bar.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        if now < self.next_look:
            return
        self.next_look = now + self.pace
        self.show(trainer, outputs["loss"].item(), batch[0].numel())

    def show(self, trainer: L.Trainer, loss: float, chunk_tokens: int) -> None:
        step, seconds = trainer.global_step, time.perf_counter() - self.start
        steps_per_second = (step - self.first_step) / seconds
        tokens = steps_per_second * chunk_tokens * trainer.world_size * trainer.accumulate_grad_batches
        val = trainer.callback_metrics.get("val/loss")
        told = f"loss {loss:.4f}  " + (f"val {val:.4f}  " if val is not None else "") + f"{tokens:,.0f} tokens/s"
        total = trainer.max_steps
        steps = f"{step:,}" + (f"/{total:,}" if total > 0 else "")
        if self.bar:
            self.bar.update(self.task, completed=step, description=told, steps=steps)
        else:
            left = f"  {(total - step) / steps_per_second:,.0f} s left" if total > 0 and steps_per_second else ""
            console.print(f"step {steps}  {told}{left}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("train/loss")
        if self.bar:
            if loss is not None:
                self.bar.update(self.task, completed=trainer.global_step, steps=f"{trainer.global_step:,}")
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

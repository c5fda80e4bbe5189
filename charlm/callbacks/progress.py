"""Progress of training: a bar on a terminal, else a line every few seconds."""

import math
import time
from typing import Annotated, Any

import lightning as L
from annotated_types import Gt
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from charlm.budget import budget_of
from charlm.callbacks.at_steps import AtSteps
from charlm.terminal import console, format_steps

# People read no faster, and reading the loss waits for the device.
SECONDS_BETWEEN_LOOKS = 0.25


class Progress(AtSteps):
    """Shows step, loss, speed, the last validation and the time left; at the end, the time it took.

    Args:
        seconds_between_lines: interval of progress lines if the output is not a terminal.
    """

    def __init__(self, seconds_between_lines: Annotated[float, Gt(0)] = 5.0):
        self.pace = SECONDS_BETWEEN_LOOKS if console.is_terminal else seconds_between_lines
        self.bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start, self.validating = time.perf_counter(), 0.0
        self.budget = budget_of(trainer)
        self.first_step = self.shown_at = trainer.global_step
        self.next_look = self.start + self.pace if trainer.is_global_zero else float("inf")
        if trainer.is_global_zero and console.is_terminal:
            columns = (
                TextColumn("[bold]step[/] {task.fields[steps]}"),
                BarColumn(bar_width=None),  # what the figures leave
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("{task.fields[clock]}"),
            )
            self.bar = Bar(*columns, console=console, refresh_per_second=8, expand=True)
            steps = format_steps(self.first_step, trainer.max_steps)
            self.task = self.bar.add_task("", total=1.0, steps=steps, clock="left")
            self.bar.update(self.task, completed=self.budget.spent(self.first_step))
            self.bar.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        self.newest = outputs["loss"], batch[0].numel()
        now = time.perf_counter()
        if now < self.next_look:
            return
        self.next_look = now + self.pace
        self.show(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validating += time.perf_counter() - self.validation_start

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        now, total = time.perf_counter(), sum(trainer.num_val_batches)
        if trainer.sanity_checking or now < self.next_look or not math.isfinite(total):
            return
        self.next_look = now + self.pace
        line = f"validating: {100 * (batch_idx + 1) / total:.0f}%"
        if self.bar:
            self.bar.update(self.task, description=line)
        else:
            steps = format_steps(trainer.global_step, trainer.max_steps)
            console.print(f"step {steps}  {line}", soft_wrap=True)

    def show(self, trainer: L.Trainer) -> None:
        loss, chunk_tokens = self.newest
        loss = loss * trainer.accumulate_grad_batches  # undo Lightning's division
        step, seconds = trainer.global_step, time.perf_counter() - self.start
        self.shown_at = step
        steps_per_second = (step - self.first_step) / seconds  # with validations, which the time left has too
        tokens_per_step = chunk_tokens * trainer.world_size * trainer.accumulate_grad_batches
        # Without them, as `charlm.callbacks.clock` counts and as the summary says.
        tokens = (step - self.first_step) * tokens_per_step / max(seconds - self.validating, 1e-9)
        val = trainer.callback_metrics.get("val/loss")
        line = f"loss {loss.item():.4f}  "
        share = getattr(trainer.val_dataloaders, "share", 1.0)
        part = "" if share == 1 else f" ({100 * share:.2g}% of it)"
        line += (f"val{part} {val:.4f}  " if val is not None else "") + f"{tokens:,.0f} tokens/s"
        steps = format_steps(step, trainer.max_steps)
        if self.bar:
            self.bar.update(self.task, completed=self.budget.spent(step), description=line, steps=steps)
        else:
            left = self.budget.seconds_left(step, steps_per_second)
            line += f"  {left:,.0f} s left" if left and left > 0 else ""
            console.print(f"step {steps}  {line}", soft_wrap=True)  # never wrapped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step > self.shown_at:
            self.show(trainer)
        if self.bar:
            spent = self.budget.spent(trainer.global_step)
            self.bar.update(self.task, completed=spent, clock="in all" if spent == 1 else "")
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
            console.print()

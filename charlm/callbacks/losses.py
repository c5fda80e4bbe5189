"""Every loss of a run, kept, whichever logger there is; a training loss that is not finite ends it."""

import csv
import io
import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from charlm.callbacks.at_steps import AtSteps
from charlm.callbacks.checkpoint import Checkpoint
from charlm.callbacks.ema import KEY
from charlm.callbacks.throughput import Throughput
from charlm.errors import DiskError, Diverged
from charlm.files import write_atomically
from charlm.run.results import LOSSES, VALIDATIONS, read_validations

MOST = 1000  # that wait to be looked at


class Losses(AtSteps):
    """Looks at losses wherever the trainer logs, as looking makes a GPU wait, and before anything is saved.

    A state with weights that are not finite is never saved. It has to come after an average of weights.

    Raises:
        Diverged: if a loss or a weight is NaN or infinite, in all processes together.
        DiskError: if the losses cannot be written.
    """

    def __init__(self, run_dir: str):
        self.file = Path(run_dir, LOSSES)
        self.open: IO[bytes] | None = None
        self.losses: list[Tensor] = []  # newest steps, not yet checked
        self.told_of = 0  # steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Truncate what was logged after the checkpoint; the resumed run logs it again."""
        self.told_of = trainer.global_step
        if trainer.is_global_zero:
            self.open = self.file.open("ab", buffering=0)
            kept = min(self.open.tell() // 4, trainer.global_step)
            self.open.truncate(4 * kept)
            self.open.write(array("f", [math.nan]) * (trainer.global_step - kept))  # which a broken disk has lost

    def after_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, losses: Sequence[Tensor]) -> None:
        self.losses += losses
        self.told_of = trainer.global_step

    def on_before_backward(self, trainer: Any, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.newest = loss.detach() * trainer.accumulate_grad_batches  # undo Lightning's division

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
        if self.note(trainer) and (trainer.global_step % trainer.log_every_n_steps == 0 or len(self.losses) >= MOST):
            self.look(trainer)

    def note(self, trainer: L.Trainer) -> bool:
        """Record the loss of the last step, if any; called before the hooks of others, which may save a checkpoint."""
        if trainer.global_step == self.told_of:
            return False
        self.losses.append(self.newest)
        self.told_of = trainer.global_step
        return True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.note(trainer)
        self.look(trainer)
        raw = checkpoint[KEY]["raw"].values() if KEY in checkpoint else []
        look_at_weights(trainer, [*pl_module.parameters(), *raw])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer)
        look_at_weights(trainer, list(pl_module.parameters()))

    def teardown(self, *_: Any, **__: Any) -> None:
        if self.open:
            self.open.close()

    on_exception = teardown

    def look(self, trainer: L.Trainer) -> None:
        if not self.losses:
            return
        on_cpu = self.losses[0].device.type == "cpu"  # another device is better asked once
        found = [loss.item() for loss in self.losses] if on_cpu else torch.stack(self.losses).tolist()
        losses = array("f", found)
        first = self.told_of - len(losses) + 1
        self.losses.clear()
        if self.open:
            left = memoryview(losses).cast("B")
            try:
                while left:  # a full disk accepts a part of the data first, and then raises the reason
                    left = left[self.open.write(left) :]
            except OSError as error:
                raise DiskError(f"{self.file} could not be written ({error.strerror}): see to the disk") from error
        wrong = [step for step, loss in enumerate(losses, start=first) if not math.isfinite(loss)]
        step = earliest(trainer, wrong[0] if wrong else None)
        if step is not None:
            told = f" is {losses[step - first]:f}" if step in wrong else " is infinite or not a number"
            raise diverged(trainer, f"the loss of step {step:,}{told}")


class Validations(L.Callback):
    """One line per validation. Runs before the checkpoint callbacks, so that the file never lags behind a checkpoint.

    Raises:
        DiskError: if it cannot be written.
    """

    def __init__(self, run_dir: str, throughput: Throughput):
        self.folder, self.throughput = Path(run_dir), throughput

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Truncate what was logged after the checkpoint; the resumed run logs it again."""
        if trainer.is_global_zero:
            text = io.StringIO(newline="")
            rows = [row for row in read_validations(self.folder) if row[0] <= trainer.global_step]
            csv.writer(text, lineterminator="\n").writerows([("step", "seconds", "val/loss"), *rows])
            write_atomically(self.folder / VALIDATIONS, lambda file: file.write(text.getvalue().encode()))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            row = trainer.global_step, self.throughput.seconds, float(trainer.callback_metrics["val/loss"])
            try:
                with (self.folder / VALIDATIONS).open("a") as file:
                    file.write("{},{:.3f},{!r}\n".format(*row))
            except OSError as error:
                told = f"{self.folder / VALIDATIONS} could not be written ({error.strerror}): see to the disk"
                raise DiskError(told) from error


def look_at_weights(trainer: L.Trainer, weights: list[Tensor]) -> None:
    finite = torch.stack([local(weight).isfinite().all() for weight in weights]).all().item()
    if earliest(trainer, None if finite else trainer.global_step) is not None:
        raise diverged(trainer, f"weights are infinite or not numbers after step {trainer.global_step:,}")


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process has."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def earliest(trainer: L.Trainer, step: int | None) -> int | None:
    """The first of all processes' steps: what ends one must end them together, or the others wait for it."""
    if trainer.world_size == 1:
        return step
    never = 2**62
    told = torch.tensor(never if step is None else step, device=trainer.strategy.root_device)
    first = int(trainer.strategy.reduce(told, reduce_op="min"))
    return None if first == never else first


def diverged(trainer: L.Trainer, told: str) -> BaseException:
    """End the run: the first process reports the reason, and the others exit silently."""
    if not trainer.is_global_zero:
        return SystemExit(Diverged.code)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    saved = [(c.saved_at, c.path) for c in callbacks if isinstance(c, Checkpoint) and c.saved_at >= 0]
    stands = "".join(f"; {os.path.relpath(path)} is of step {step:,}, and whole" for step, path in saved)
    return Diverged(f"{Diverged.words}: {told}; try a lower optimizer.lr, or trainer.gradient_clip_val=1{stands}")

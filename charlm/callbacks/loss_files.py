"""The files `losses.f32` and `validations.csv` of a run, and the check that losses and weights are finite."""

import csv
import io
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from charlm.callbacks.checkpoint import Checkpoint
from charlm.callbacks.ema import KEY
from charlm.errors import DiskError, Diverged
from charlm.files import write_atomically
from charlm.run.results import LOSSES, VALIDATIONS, read_validations

MOST_UNCHECKED = 1000  # losses


class Losses:
    """The training loss of every step, checked where the trainer logs: reading a loss makes a GPU wait."""

    def __init__(self, run_dir: str):
        self.path = Path(run_dir, LOSSES)
        self.file: IO[bytes] | None = None
        self.unchecked: list[Tensor] = []
        self.step = 0  # the last step with a loss
        self.newest: Tensor

    def open(self, trainer: L.Trainer) -> None:
        """Truncate what was logged after the checkpoint; the resumed run logs it again."""
        self.step = trainer.global_step
        if trainer.is_global_zero:
            self.file = self.path.open("ab", buffering=0)
            kept = min(self.file.tell() // 4, trainer.global_step)
            self.file.truncate(4 * kept)
            self.file.write(array("f", [math.nan]) * (trainer.global_step - kept))  # losses that a broken disk lost

    def add(self, losses: Sequence[Tensor], step: int) -> None:
        self.unchecked += losses
        self.step = step

    def end_step(self, trainer: Any) -> None:
        added = self.add_newest(trainer)
        if added and (trainer.global_step % trainer.log_every_n_steps == 0 or len(self.unchecked) >= MOST_UNCHECKED):
            self.check(trainer)

    def add_newest(self, trainer: L.Trainer) -> bool:
        """Add the loss of the current step, unless it was added or the batch only accumulates gradients."""
        if trainer.global_step == self.step:
            return False
        self.add([self.newest], trainer.global_step)
        return True

    def check(self, trainer: L.Trainer) -> None:
        """Write the losses to the file, those of the current step included.

        Raises:
            Diverged: if one is NaN or infinite.
            DiskError: if they cannot be written.
        """
        self.add_newest(trainer)  # another callback may save a checkpoint at the end of this step
        if not self.unchecked:
            return
        on_cpu = self.unchecked[0].device.type == "cpu"  # one transfer from a GPU is faster than many
        values = [loss.item() for loss in self.unchecked] if on_cpu else torch.stack(self.unchecked).tolist()
        losses = array("f", values)
        first = self.step - len(losses) + 1
        self.unchecked.clear()
        self.write(memoryview(losses).cast("B"))
        wrong = [step for step, loss in enumerate(losses, start=first) if not math.isfinite(loss)]
        step = earliest(trainer, wrong[0] if wrong else None)
        if step is not None:
            value = f"{losses[step - first]:f}" if step in wrong else "infinite or not a number"
            raise diverged(trainer, f"the loss of step {step:,} is {value}")

    def write(self, data: memoryview) -> None:
        if not self.file:
            return
        try:
            while data:  # a full disk accepts a part of the data first, and then raises the reason
                data = data[self.file.write(data) :]
        except OSError as error:
            raise DiskError(f"{self.path} could not be written ({error.strerror}): free space on the disk") from error

    def close(self) -> None:
        if self.file:
            self.file.close()


class Validations:
    """One line for each validation: step, seconds of training, val loss."""

    def __init__(self, run_dir: str):
        self.folder = Path(run_dir)
        self.step = -1  # the last step with a line

    def open(self, trainer: L.Trainer) -> None:
        """Truncate what was logged after the checkpoint; the resumed run logs it again."""
        self.step = trainer.global_step  # a validation at this step is in the file
        if trainer.is_global_zero:
            text = io.StringIO(newline="")
            rows = [row for row in read_validations(self.folder) if row[0] <= trainer.global_step]
            csv.writer(text, lineterminator="\n").writerows([("step", "seconds", "val/loss"), *rows])
            write_atomically(self.folder / VALIDATIONS, lambda file: file.write(text.getvalue().encode()))

    def add(self, trainer: L.Trainer, seconds: float) -> None:
        """Add the line of a validation at this step, unless it is there: a checkpoint must not precede it.

        Raises:
            DiskError: if it cannot be written.
        """
        module: Any = trainer.lightning_module
        if not trainer.is_global_zero or module.validated_at != trainer.global_step or self.step == trainer.global_step:
            return
        self.step = trainer.global_step
        path, loss = self.folder / VALIDATIONS, float(trainer.callback_metrics["val/loss"])
        try:
            with path.open("a") as file:
                file.write(f"{self.step},{seconds:.3f},{loss!r}\n")
        except OSError as error:
            raise DiskError(f"{path} could not be written ({error.strerror}): free space on the disk") from error


def check_weights(trainer: L.Trainer, module: L.LightningModule, checkpoint: Mapping[str, Any] | None = None) -> None:
    """Check the weights of the module and, with a weight average, the training weights in the checkpoint.

    Raises:
        Diverged: if one is NaN or infinite.
    """
    raw = checkpoint[KEY]["raw"].values() if checkpoint and KEY in checkpoint else []
    each = [local(weight).isfinite().all() for weight in [*module.parameters(), *raw]]
    finite = not each or torch.stack(each).all().item()
    if earliest(trainer, None if finite else trainer.global_step) is not None:
        raise diverged(trainer, f"weights are infinite or not numbers after step {trainer.global_step:,}")


def local(parameter: Tensor) -> Tensor:
    """Return the shard of a parameter that this process has."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def earliest(trainer: L.Trainer, step: int | None) -> int | None:
    """Return the first bad step of all processes: they must end together, or the others wait forever."""
    if trainer.world_size == 1:
        return step
    never = 2**62
    mine = torch.tensor(never if step is None else step, device=trainer.strategy.root_device)
    first = int(trainer.strategy.reduce(mine, reduce_op="min"))
    return None if first == never else first


def diverged(trainer: L.Trainer, reason: str) -> BaseException:
    """End the run: the first process reports the reason, and the others exit silently."""
    if not trainer.is_global_zero:
        return SystemExit(Diverged.code)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    saved = [(c.saved_at, c.path) for c in callbacks if isinstance(c, Checkpoint) and c.saved_at >= 0]
    intact = "".join(f"; {os.path.relpath(path)} is of step {step:,}, and intact" for step, path in saved)
    return Diverged(f"{Diverged.words}: {reason}; try a lower optimizer.lr, or trainer.gradient_clip_val=1{intact}")

"""Stop a run on a signal or a closed pipe: finish the step, save, print how to continue, exit as a stopped process."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

from charlm import terminal
from charlm.callbacks.at_steps import AtSteps
from charlm.callbacks.checkpoint import Checkpoint, between_steps, validates_now
from charlm.system import posix, streams

# Slurm sends the last two before the time limit: sbatch --signal=USR1@60, and USR2 for submitit.
SIGNALS = posix.signals("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
NAMES = {streams.SIGPIPE: "SIGPIPE"} | {number: number.name for number in SIGNALS}


class Stop(AtSteps):
    """Ends the process with exit code 128 + signal number, as shells do. A second Ctrl-C stops at once.

    Runs after the checkpoint callbacks, so that the last step is saved.

    Args:
        at: a step to stop after; the exit code is then 0.
    """

    def __init__(self, at: int | None = None) -> None:
        self.every_n_steps = at  # besides the steps at which Lightning calls hooks anyway
        self.at = at
        self.received = 0
        self.before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Signals that the parent ignored, as nohup does, stay ignored.
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}
        # A run that was ended after it had stopped early goes on to its final figures, and not to more steps.
        if any(c.stopping_reason != EarlyStoppingReason.NOT_STOPPED for c in early_stopping(trainer)):
            trainer.should_stop = True

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        at_its_end = trainer.should_stop or trainer.global_step >= trainer.max_steps > 0
        if not validates_now(trainer) and not at_its_end:
            self.leave(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and not trainer.global_step >= trainer.max_steps > 0:
            self.leave(trainer)

    def leave(self, trainer: L.Trainer, at_end: bool = False) -> None:
        """Stop all processes together, whichever of them received the signal."""
        if not at_end and not between_steps(trainer):
            return
        number = self.received
        # After its last step a run needs no reader to finish: results.json is worth more than the exit.
        if not number and streams.reader_left and not at_end:
            number = streams.SIGPIPE
        if trainer.world_size > 1:
            told = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(told, reduce_op="max"))
        if not number and trainer.global_step != self.at:
            return
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        paths: list[Path] = []
        for callback in callbacks:
            if isinstance(callback, Checkpoint):
                if callback.saved_at != trainer.global_step:
                    callback.save(trainer)
                paths.append(callback.path)
        if trainer.is_global_zero:
            why = f"stopped by {NAMES[number]}" if number else "stopped"
            terminal.stopped(why, trainer.global_step, paths[0].parent.parent if paths else None)
        raise SystemExit(128 + number if number else 0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at = None  # as it is at its end
        self.leave(trainer, at_end=True)
        self.give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.give_back()

    def give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def early_stopping(trainer: L.Trainer) -> list[EarlyStopping]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]

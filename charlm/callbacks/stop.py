"""Stop a run on a signal or a closed pipe: finish the step, save, print how to continue, exit as a stopped process."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

from charlm import terminal
from charlm.callbacks.checkpoint import Checkpoint, between_steps, validates_now
from charlm.system import posix, streams

# Slurm sends the last two before the time limit: sbatch --signal=USR1@60, and USR2 for submitit.
SIGNALS = posix.signals("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
NAMES = {streams.SIGPIPE: "a closed pipe"} | {number: number.name for number in SIGNALS}
NAMES[signal.SIGINT] = "Ctrl-C"


class Stop:
    """Ends the process with exit code 128 + signal number, as shells do. A second Ctrl-C stops at once.

    Args:
        at: a step to stop after; the exit code is then 0.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.received = 0
        self.handlers: dict[signal.Signals, Any] = {}  # to restore after training

    def listen(self, trainer: L.Trainer) -> None:
        """Install the signal handlers."""
        # Signals that the parent ignored, as nohup does, stay ignored.
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self.receive) for number in numbers}
        # A run that early stopping had ended before it was killed resumes with its final figures, not with more steps.
        if any(c.stopping_reason != EarlyStoppingReason.NOT_STOPPED for c in early_stopping(trainer)):
            trainer.should_stop = True

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def end_step(self, trainer: L.Trainer) -> None:
        at_its_end = trainer.should_stop or trainer.global_step >= trainer.max_steps > 0
        if not validates_now(trainer) and not at_its_end:
            self.stop_if_due(trainer)

    def end_validation(self, trainer: L.Trainer) -> None:
        if not trainer.global_step >= trainer.max_steps > 0:
            self.stop_if_due(trainer)

    def end_training(self, trainer: L.Trainer) -> None:
        self.at = None  # it was going to stop anyway
        self.stop_if_due(trainer, at_end=True)
        self.restore_handlers()

    def stop_if_due(self, trainer: L.Trainer, at_end: bool = False) -> None:
        """Stop all processes together, whichever of them received the signal."""
        if not at_end and not between_steps(trainer):
            return
        number = self.received
        # After its last step a run needs no reader to finish: results.json is worth more than the exit.
        if not number and streams.reader_left and not at_end:
            number = streams.SIGPIPE
        if trainer.world_size > 1:
            mine = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(mine, reduce_op="max"))
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

    def restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


def early_stopping(trainer: L.Trainer) -> list[EarlyStopping]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]

"""Save checkpoints of a run at intervals and at its end, atomically."""

import time
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as SavesLast

from charlm.callbacks.at_steps import AtSteps
from charlm.checkpoint import LAST, archive, write
from charlm.checkpoint.restore import check_optimizers, check_progress, damaged, failed_to_restore
from charlm.errors import DiskError, Diverged, InputError
from charlm.internals.lightning import is_accumulating, metrics_to_log, validates_this_epoch
from charlm.logger import CSV, TensorBoard

SMALL = 2**24  # bytes of weights


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints as files of `charlm.checkpoint.archive`, written atomically.

    A kill or a full disk costs only the new one.

    Raises:
        DiskError: if a checkpoint cannot be written; the previous one stays intact.
        InputError: if it holds something that no checkpoint can hold, such as a callback's NumPy array.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            write(checkpoint, Path(path))
        except OSError as error:
            advice = "there is none from before: choose another folder with hydra.run.dir=..."
            if Path(path).is_file():
                run_dir = Path(path).parent.parent
                advice = f"the previous one is intact: free space on the disk, then type resume={run_dir}"
            raise DiskError(
                f"the checkpoint {path} could not be written ({error.strerror or error}), and {advice}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Return the content of a checkpoint of charlm, or of one that Lightning wrote without this plugin."""
        path = Path(path)
        return archive.load_lightning(path) if archive.is_zip(path) else archive.load(path)


def save(trainer: L.Trainer, path: Path) -> None:
    """Save a checkpoint, or end all processes together: only the first writes and knows whether it succeeded.

    Raises:
        InputError: if saving failed, in the first process; the others exit silently.
    """
    failure = None
    try:
        trainer.save_checkpoint(path)
    except Diverged:  # all processes raise it
        raise
    except InputError as error:  # DiskError is one
        failure = error
        trainer.strategy.barrier()  # the other processes wait here
    code = trainer.strategy.broadcast(failure.code if failure else 0)
    if code:
        raise failure or SystemExit(code)


def between_steps(trainer: L.Trainer) -> bool:
    """Return whether no accumulated gradients are pending; a checkpoint does not hold them."""
    return not is_accumulating(trainer)


def size_of(module: L.LightningModule) -> int:
    """Return the bytes of all weights of a module."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def validates_now(trainer: L.Trainer) -> bool:
    """Return whether a validation follows this step: a checkpoint saved before it would resume after it, without it."""
    every: Any = trainer.val_check_batch
    loop = trainer.fit_loop.epoch_loop
    since = loop.batch_progress.total if trainer.check_val_every_n_epoch is None else loop.batch_progress.current
    return validates_this_epoch(trainer) and since.ready % every == 0


class Checkpoint(AtSteps, SavesLast):
    """Saves the newest checkpoint as `dirpath`/last.ckpt and keeps the one before as previous.ckpt.

    The first is saved before the first step, unless the weights are large: it holds nothing that the run does not make
    again. Lightning calls subclasses of its own Checkpoint after all other
    callbacks, so a checkpoint holds the state and the logs that these have after the same step.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between checkpoints; the end of training always saves one.
        every_n_minutes: longest time between checkpoints. Several processes must agree, and so look at the clock only
            where the trainer logs.
    """

    every_n_steps: int

    def __init__(
        self,
        dirpath: str,
        every_n_steps: Annotated[int, Ge(1)] = 1000,
        every_n_minutes: Annotated[float, Gt(0)] = 5,
    ):
        self.path = Path(dirpath, LAST)
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.saved_at, self.saved_when = -1, time.monotonic()
        self.logged: dict[str, int] = {}
        self.unlogged: dict[str, float] = {}
        self.resumed_at: int | None = None
        self.loaded: dict[str, Any] = {}  # until the optimizers exist to check it

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            check_progress(trainer, checkpoint, trainer.ckpt_path)
            self.loaded, self.resumed_at = checkpoint, checkpoint["global_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.loaded:
            check_optimizers(trainer, self.loaded, trainer.ckpt_path)
            self.loaded = {}
        if not trainer.ckpt_path and size_of(pl_module) <= SMALL:  # before the first step is logged
            fresh = [optimizer.state_dict() for optimizer in trainer.optimizers]
            self.save(trainer)
            for optimizer, state in zip(trainer.optimizers, fresh, strict=True):
                if optimizer.state:  # sharded optimizers take a step on zeros to create their state
                    optimizer.load_state_dict(state)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_when = time.monotonic()
        if self.resumed_at not in (None, trainer.global_step):
            raise damaged(trainer.ckpt_path, f"its loops count {trainer.global_step} steps, and not {self.resumed_at}")
        for logger in trainer.loggers:
            if self.unlogged and isinstance(logger, TensorBoard | CSV):
                logger.log_metrics(self.unlogged, trainer.global_step - 1)
        steps = trainer.strategy.all_gather(torch.tensor(trainer.global_step, device=trainer.strategy.root_device))
        if steps.min() != steps.max():
            raise InputError(
                f"processes found states of different steps, {steps.tolist()}: is {self.path.parent.parent} on a disk "
                f"that all machines share?"
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not validates_now(trainer):
            self.save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.save_if_due(trainer)

    def save_if_due(self, trainer: L.Trainer) -> None:
        if not between_steps(trainer):
            return
        due = trainer.global_step % self.every_n_steps == 0 or self.overdue(trainer)
        at_its_end = trainer.global_step >= trainer.max_steps > 0  # on_train_end saves, after all other callbacks
        if due and not at_its_end:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self.saved_at:
            self.save(trainer)

    def overdue(self, trainer: L.Trainer) -> bool:
        late = time.monotonic() - self.saved_when > 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return late
        settings: Any = trainer
        return trainer.global_step % settings.log_every_n_steps == 0 and trainer.strategy.broadcast(late)

    def save(self, trainer: L.Trainer) -> None:
        self.logged = {}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoard | CSV):
                self.logged |= logger.position()
        self.unlogged = unlogged(trainer)
        save(trainer, self.path)
        self.saved_at, self.saved_when = trainer.global_step, time.monotonic()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if failed_to_restore(exception):
            raise damaged(trainer.ckpt_path, f"{type(exception).__name__}: {exception}") from exception

    def state_dict(self) -> dict[str, Any]:
        return {"logged": self.logged, "unlogged": self.unlogged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unlogged = {str(name): float(value) for name, value in state_dict["unlogged"].items()}


def unlogged(trainer: Any) -> dict[str, float]:
    """Return metrics of the current step that Lightning will log only after the checkpoint is saved."""
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    return {} if total.processed == total.completed else metrics_to_log(trainer)

"""Private names of Lightning 2.6."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

# Modules and functions of Lightning that restore a state: a traceback through them means a state that does not fit.
RESTORING = {
    "lightning.pytorch.trainer.connectors.checkpoint_connector": "restore",
    "lightning.pytorch.loops.fit_loop": "load_combined_loader_states",
}


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether gradients wait for those of more batches. No public name tells when a step is made."""
    return trainer.fit_loop._should_accumulate()


def validates_this_epoch(trainer: L.Trainer) -> bool:
    """Return whether the current epoch has a validation, by the trainer's own rule."""
    return trainer.fit_loop.epoch_loop._should_check_val_epoch()


def skips_backward(trainer: L.Trainer) -> bool:
    """Return whether the loop runs without backward, as the batch size finder has it."""
    return bool(trainer.fit_loop._skip_backward)


def logged_steps(trainer: L.Trainer) -> int:
    """Return the number that decides whether the trainer logs: its optimizer steps, counted by its epoch loop."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def count_steps(trainer: L.Trainer, steps: int, batches: int, schedulers: int) -> None:
    """Add steps taken outside of the loop to its counters: which decide what is due."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.batch_progress.increment_by(batches)
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    optimizer.step.increment_by(steps)
    optimizer.zero_grad.increment_by(steps)
    loop.scheduler_progress.increment_by(steps * schedulers)
    loop._batches_that_stepped += steps


def count_own_step(trainer: L.Trainer, schedulers: int) -> None:
    """Add one step to the counters, up to the point where Lightning's loop calls `on_train_batch_end`."""
    loop: Any = trainer.fit_loop.epoch_loop
    progress, optimizer = loop.batch_progress, loop.automatic_optimization.optim_progress.optimizer
    progress.increment_ready()
    progress.is_last_batch = progress.current.ready == trainer.num_training_batches
    progress.increment_started()
    optimizer.step.increment_by(1)
    optimizer.zero_grad.increment_by(1)
    progress.increment_processed()
    loop.scheduler_progress.increment_by(schedulers)


@contextmanager
def step_metrics(trainer: Any, module: L.LightningModule, batch: Any) -> Iterator[None]:
    """Let hooks log metrics of a step that the loop has not taken, and pass them on as the loop does at its end."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    logged: dict[str, Any] = {}
    connector.on_batch_start(batch)
    of_step: Any = {"log": logged, "callback": logged, "pbar": {}}
    # Instance attributes, which hide methods that take as long as the steps of a bigram.
    loop._results.metrics = lambda on_step: of_step
    module.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
    try:
        yield
        connector.on_batch_end()
        loop.batch_progress.increment_completed()
        connector.update_train_step_metrics()
    finally:
        del loop._results.metrics, module.log


def fetcher_of(trainer: L.Trainer) -> Any:
    """Return the loop's data fetcher, which its methods take."""
    return trainer.fit_loop._data_fetcher


def batches_of(fetcher: Any) -> Iterator[Any]:
    """Return the iterator of the one train loader inside the loop's data fetcher, to take batches from it directly."""
    batches: Iterator[Any] = fetcher.iterator._iterator.iterators[0]
    return batches


def checkpoint_interval(callback: ModelCheckpoint) -> int:
    """Return every how many steps a ModelCheckpoint saves; 0 if it does not save by steps."""
    return int(callback._every_n_train_steps)


def metrics_to_log(trainer: L.Trainer) -> dict[str, float]:
    """Return what the current step has logged; the trainer passes it to its loggers after all hooks of the step."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return {}
    return {name: float(value) for name, value in connector.metrics["log"].items()}


def has_written(logger: TensorBoardLogger) -> bool:
    """Return whether a logger has opened its event file; `logger.experiment` would open one."""
    return logger._experiment is not None


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set over how many processes parameters are sharded; known only when the strategy has its environment."""
    strategy._data_parallel_size = size

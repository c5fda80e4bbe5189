"""Conditions for grouped steps: only if results and hooks stay the same."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from charlm.callbacks.at_steps import AtSteps
from charlm.data import CharDataModule
from charlm.internals.lightning import checkpoint_interval
from charlm.module import LanguageModel

# Hooks called for each batch or step. Only AtSteps callbacks and the classes below may have them.
HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
# Methods that a subclass of LanguageModel must not override.
OF_MODULE = (
    *HOOKS,
    "training_step",
    "forward",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "clip_gradients",
    "lr_scheduler_step",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "seed_batch",
)
OF_DATA = ("train_dataloader", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

# Lightning's callbacks with batch hooks, and the interval at which they act, in steps. Lightning takes the logged
# steps anyway; clocks and progress bars read correct values at every step.
LOOKS: dict[type[L.Callback], Callable[[Any], int]] = {
    LearningRateMonitor: lambda _: 0,
    DeviceStatsMonitor: lambda _: 0,
    Timer: lambda _: 0,
    TQDMProgressBar: lambda bar: bar.refresh_rate if bar.refresh_rate > 1 else 0,
    RichProgressBar: lambda _: 0,
    ModelCheckpoint: checkpoint_interval,
}


def steps_between(callback: L.Callback) -> int:
    """Return n if Lightning must call the callback at each multiple of n steps; 0 if any step will do."""
    if isinstance(callback, AtSteps):
        return callback.every_n_steps or 0
    look = LOOKS.get(type(callback))
    return look(callback) if look else 0


def reason_against(trainer: Any, module: L.LightningModule) -> str | None:
    """Return why each step must be Lightning's own, as words that follow a colon; None if it need not."""
    data = trainer.datamodule
    if not isinstance(module, LanguageModel):
        return f"{type(module).__name__} is no LanguageModel"
    if changed := replaced(module, LanguageModel, OF_MODULE):
        return f"{type(module).__name__} has {changed} of its own"
    if data is not None and (not isinstance(data, CharDataModule) or (replaced(data, CharDataModule, OF_DATA))):
        return f"{type(data).__name__} serves the batches"
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"strategy {type(trainer.strategy).__name__}"
    if getattr(trainer.precision_plugin, "scaler", None):
        return f"precision {trainer.precision} scales each gradient"
    for flag, usual in {"limit_train_batches": 1.0, "overfit_batches": 0, "fast_dev_run": False}.items():
        if getattr(trainer, flag) != usual:
            return f"{flag}={getattr(trainer, flag)} limits or repeats batches"
    if type(trainer.profiler) is not PassThroughProfiler:
        return f"{type(trainer.profiler).__name__} looks at each step"
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return f"{type(callback).__name__} changes how many batches make a step"
        if hook := hook_of_each_step(callback):
            return f"{type(callback).__name__} has {hook}, and so needs every batch"
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and (config.frequency != 1 or config.reduce_on_plateau):
            return f"{type(config.scheduler).__name__} is not stepped at every step"
    return None


def hook_of_each_step(callback: L.Callback | type[L.Callback]) -> str | None:
    """Return the first hook that makes a callback, or a class of callbacks, need every step; None if none does."""
    kind = callback if isinstance(callback, type) else type(callback)
    known = AtSteps in kind.__bases__ or kind in LOOKS
    return None if known else replaced(callback, L.Callback, HOOKS)


def replaced(thing: object, base: type, names: tuple[str, ...]) -> str | None:
    """Return the first of `names` that an object or its class, or a class itself, overrides."""
    kind = thing if isinstance(thing, type) else type(thing)
    for name in names:
        if name in vars(thing) or getattr(kind, name) is not getattr(base, name):
            return name
    return None

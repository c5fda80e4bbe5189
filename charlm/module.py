"""The one LightningModule: step, loss and logging for every model."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from charlm.budget import Budget, budget_of
from charlm.cuda_graph import Batch, CUDAGraph
from charlm.data.chunks import EvalBatch, Windows
from charlm.evaluate import Score, window_losses

# What a validation puts on the curves, of the exact figures.
VALIDATION = ("val/loss", "val/bits_per_char", "val/perplexity")
MASK = 2**64 - 1
ALONE = nullcontext()  # there is nobody to wait for
# Lightning's hooks of a callback that make it look at every pass, and at every batch.
AROUND_BACKWARD = ("on_before_backward", "on_after_backward")
AROUND_A_BATCH = ("on_train_batch_start", "on_train_batch_end")


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of x, y (B, T), in nats per character."""
    shortcut: Any = getattr(model, "nll", None)
    if shortcut:
        loss: Tensor = shortcut(x, y).mean()
        return loss
    logits = model(x)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def forward_backward(model: nn.Module, x: Tensor, y: Tensor, share: int) -> Tensor:
    """Add the gradient of the loss / `share` to that of the parameters. Returns the loss."""
    shortcut: Any = getattr(model, "backward", None)
    if shortcut and share == 1 and not torch.compiler.is_compiling():
        alone: Tensor = shortcut(x, y)
        return alone
    with torch.enable_grad():
        loss = cross_entropy(model, x, y)
        (loss / share if share > 1 else loss).backward()
    return loss.detach()


def alone(last: bool) -> AbstractContextManager[None]:
    """What surrounds a batch of one process that trains by itself."""
    return ALONE


def mix(mixed: int, number: int) -> int:
    """64 bits that depend on both, well mixed: a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
    return mixed ^ mixed >> 31


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that dropout on `device` draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


class LanguageModel(L.LightningModule):
    """Trains a model to predict the next character.

    Args:
        model: forward(idx (B, T)) -> logits (B, T, V).
        optimizer: makes from the model its optimizers, which have different parameters.
        scheduler: makes from an optimizer and the budget its learning-rate schedule, or None for a constant rate.
        record: what a later command needs to know of this run, in plain types; saved in every checkpoint.
        steps_per_execution: the optimizer steps, at most, that Lightning takes for one. Their number changes no bit
            of the training: they end where anything else is due.
        compile: torch.compile for the model or, on one device, for all of forward, loss and backward.
        cuda_graph: capture `step` once and replay it; on one GPU.
        seed: of what is drawn at random within a step, as by dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[nn.Module], Sequence[Optimizer]],
        scheduler: Callable[[Optimizer, Budget], LRScheduler | None],
        record: dict[str, Any] | None = None,
        steps_per_execution: int = 1,
        compile: bool = False,
        cuda_graph: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.make_optimizers, self.make_scheduler = optimizer, scheduler
        self.record = record or {}
        self.steps_per_execution = steps_per_execution
        self.compile_it, self.graph_it = compile, cuda_graph
        self.seed = seed
        self.validated_at = -1
        self.losses: list[Tensor] = []  # of the newest steps, until somebody has looked at them

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step on the mean loss of the batches. Returns the loss of the last one."""
        for number, (x, y) in enumerate(batches, start=1):
            with self.synchronized(number == len(batches)):
                loss = self.forward_backward(x, y, len(batches))
        if self.clips:
            self.clip()
        self.update()
        for parameter in self.trained:
            parameter.grad = None
        return loss

    @torch.no_grad()  # once for all steps; `forward_backward` has its gradient nevertheless
    def training_step(self, dataloader_iter: Iterator[tuple[Batch, int, int]]) -> Tensor:
        """All steps until something else is due, as a call by Lightning costs more than a step of a small model."""
        trainer: Any = self.trainer
        first, n_batches = trainer.global_step, range(trainer.accumulate_grad_batches)
        steps = min(self.steps_per_execution, *(every - first % every for every in self.due))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        newest = trainer.optimizers[0].param_groups[0]
        for step in range(first, first + steps):
            # What a step draws at random, as for dropout, does not depend on what was drawn before.
            self.generator.manual_seed(mix(self.mixed, step))
            lr = 1 * newest["lr"]  # a copy, also of a tensor
            loss = self.run([self.fetch(dataloader_iter) for _ in n_batches])
            self.losses.append(loss.clone() if self.graph_it else loss)  # a graph's next replay overwrites it
            for scheduler in schedulers:
                scheduler.step()
        self.count(steps)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:  # not self.log: it costs as much as several steps of a small model
                logger.log_metrics({"train/loss": loss.item(), "train/lr": float(lr)}, trainer.global_step)
        return loss

    def configure_model(self) -> None:
        """Choose the shortest way through forward and backward that serves strategy, precision and callbacks."""
        strategy, callbacks = self.trainer.strategy, self.trainer.callbacks  # type: ignore[attr-defined]
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        watched = any(is_overridden(hook, c, L.Callback) for hook in AROUND_BACKWARD for c in callbacks)
        self.forward_backward: Callable[[Tensor, Tensor, int], Tensor]
        if isinstance(strategy, SingleDeviceStrategy) and not self.scaler and not watched:
            if self.compile_it:
                torch._dynamo.config.trace_autograd_ops = True  # backward in the same graph
            shortest = torch.compile(forward_backward) if self.compile_it else forward_backward
            self.forward_backward, self.synchronized = partial(shortest, self.model), alone
        else:
            self.forward_backward, self.synchronized = self.forward_backward_by_lightning, self.synchronized_by_strategy
            if self.compile_it:
                self.model.compile()
        if isinstance(strategy, ModelParallelStrategy):
            self.shard(strategy.device_mesh["data_parallel"])
        # Lightning refuses to accumulate and to clip beside manual optimization, because it would not: `step` does.
        self.automatic_optimization = False

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the parameters over the processes, layer by layer (FSDP2: Zhao et al. 2023, in its newer form)."""
        self._unsharded = [copy.deepcopy(self.model)]  # in a list, as it is no part of this module
        for layers in reversed([module for module in self.model.modules() if isinstance(module, nn.ModuleList)]):
            for layer in layers:  # those within others first
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if hasattr(self.model, "nll"):
            register_fsdp_forward_method(self.model, "nll")

    def forward_backward_by_lightning(self, x: Tensor, y: Tensor, share: int) -> Tensor:
        """The same for several processes, for scaled gradients and for callbacks that look at single passes."""
        with torch.enable_grad():
            loss = cross_entropy(self.model, x, y)
            self.manual_backward(loss / share if share > 1 else loss)
        return loss.detach()

    def synchronized_by_strategy(self, last: bool) -> AbstractContextManager[None]:
        """Processes exchange their gradients with the last batch of a step, and not before."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        strategy = self.trainer.strategy
        return ALONE if last or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()

    def clip(self) -> None:
        """Keep the gradient within trainer.gradient_clip_val."""
        limit: Any = self.trainer.gradient_clip_val
        if self.scaler:
            for optimizer in self.trainer.optimizers:
                self.scaler.unscale_(optimizer)
        by_value = self.trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        (clip_grad_value_ if by_value else clip_grad_norm_)(self.model.parameters(), limit)

    def update(self) -> None:
        """Let every optimizer take its step."""
        for callback in self.before_update:
            for optimizer in self.updated:
                callback.on_before_optimizer_step(self.trainer, self, optimizer)
        for optimizer in self.updated:
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler:
            self.scaler.update()

    def fetch(self, dataloader_iter: Iterator[tuple[Batch, int, int]]) -> Batch:
        """The next batch, of those that come several at a time."""
        if not self.fetched:
            (x, y), _, _ = next(dataloader_iter)  # (n, B, T)
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            self.fetched.extend(zip(x, y, strict=True))
        return self.fetched.popleft()

    def count(self, steps: int) -> None:
        """Lightning takes a call for one batch and sees no optimizer: tell its loop how many steps there were."""
        loop = self.trainer.fit_loop.epoch_loop
        loop.batch_progress.increment_by(steps - 1)
        loop.manual_optimization.optim_step_progress.increment_by(steps)
        loop._batches_that_stepped = self.trainer.global_step - 1  # Lightning adds the last one

    def on_train_start(self) -> None:
        """Note what is due at which steps: where it is, Lightning must have its turn."""
        trainer: Any = self.trainer
        due = [trainer.max_steps, trainer.val_check_batch, trainer.log_every_n_steps]
        for callback in trainer.callbacks:
            # A callback that looks at every batch may say that it need not; Lightning's clock need not.
            looks = any(is_overridden(hook, callback, L.Callback) for hook in AROUND_A_BATCH)
            due.append(getattr(callback, "every_n_steps", 1 if looks and not isinstance(callback, Timer) else None))
        self.due = [int(every) for every in due if every and 0 < every < math.inf]
        self.generator = generator_of(self.device)
        self.fetched: deque[Batch] = deque()
        self.mixed = mix(mix(0, self.seed), trainer.global_rank)
        self.trained, self.updated = list(self.model.parameters()), trainer.optimizers
        self.clips = trainer.gradient_clip_val is not None
        self.run = CUDAGraph(self.step, trainer.optimizers, self.device) if self.graph_it else self.step
        self.before_update = [c for c in trainer.callbacks if is_overridden("on_before_optimizer_step", c, L.Callback)]

    def on_validation_epoch_start(self) -> None:
        self.windows: Windows = self.trainer.val_dataloaders  # type: ignore[assignment]
        self.window_nll = torch.zeros(self.windows.n_windows, device=self.device)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.window_nll[batch.windows] += window_losses(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        # Every window was scored by one rank and is zero on the others: the sum is exact, whatever the world size.
        window_nll = self.trainer.strategy.reduce(self.window_nll, reduce_op="sum")
        score = Score.of(window_nll, self.windows.counts())
        told = {name: value for name, value in score.figures("val").items() if name in VALIDATION}
        for logger in self.trainer.loggers:  # not self.log, as in `training_step`
            logger.log_metrics(told, self.global_step)
        self.trainer.callback_metrics.update({n: torch.tensor(v, dtype=torch.float64) for n, v in told.items()})
        self.validated_at = self.global_step

    def configure_optimizers(self) -> Any:
        budget = self.budget()
        made = []
        for optimizer in self.make_optimizers(self.model):
            scheduler = self.make_scheduler(optimizer, budget)
            schedule = {"scheduler": scheduler, "interval": "step"}
            made.append({"optimizer": optimizer} | ({"lr_scheduler": schedule} if scheduler else {}))
        return made

    def budget(self) -> Budget:
        """What ends the run. The clock of the first process counts for all, which so take the same rate."""
        budget, strategy = budget_of(self.trainer), self.trainer.strategy
        return replace(budget, clock=lambda: strategy.broadcast(budget.clock())) if budget.seconds else budget

    def whole(self) -> nn.Module:
        """The model with all of its weights. Where they are sharded, all processes must ask for it together."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        whole = self._unsharded[0]
        whole.load_state_dict(weights)
        return whole.train(self.model.training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["charlm"], checkpoint["validated_at"] = self.record, self.validated_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validated_at = checkpoint["validated_at"]

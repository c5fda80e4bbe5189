"""Several optimizer steps between two of Lightning's."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge
from torch import Tensor

from charlm.callbacks.at_steps import AtSteps
from charlm.data.chunks import RandomChunks
from charlm.internals.lightning import batches_of, count_steps, logged_steps, skips_backward
from charlm.model import multiplications
from charlm.module import Batch, LanguageModel
from charlm.speed.conditions import reason_against, steps_between
from charlm.speed.cuda_graph import CUDAGraph
from charlm.speed.table_gradient import table_gradient

if TYPE_CHECKING:
    from charlm.speed.pack import Pack

MOST_STEPS = 100  # steps in a group: a signal waits for its end
FIRST_STEPS = 10  # steps in a group on a GPU, until their time is known
GROUP_SECONDS = 0.1  # of a group on a GPU; Lightning takes about a millisecond between two groups


class GroupedSteps(L.Callback):
    """Takes optimizer steps in groups where the results are the same as one by one.

    A grouped step does the same as Lightning's, in the same order: zero_grad, forward, backward,
    clip, optimizer, schedule. `charlm.speed.conditions` has the conditions.

    Args:
        steps_per_execution: most optimizer steps in a group; auto: by the size or the time of a step. It changes only
            the speed.
        cuda_graph: capture the step once and replay it, on one GPU; helps models so small that launches dominate.
    """

    pack: "Pack | None" = None  # of this process, whose runs train together

    def __init__(self, steps_per_execution: Annotated[int, Ge(1)] | Literal["auto"] = "auto", cuda_graph: bool = False):
        self.steps_per_execution, self.cuda_graph = steps_per_execution, cuda_graph
        self.loop: Any = None

    def group(self, model: torch.nn.Module, tokens_per_batch: int, device: torch.device) -> "GroupSize":
        """Return the size of the groups of a run."""
        if self.steps_per_execution != "auto":
            return GroupSize(self.steps_per_execution)
        if measured_on(device):
            return GroupSize(FIRST_STEPS, device)
        return GroupSize(max(1, min(MOST_STEPS, int(2e8 / multiplications(model, tokens_per_batch)))))

    def describe(self, trainer: L.Trainer, module: LanguageModel, tokens_per_batch: int) -> str:
        """Describe how steps are taken, and why, for the header of a run."""
        against = reason_against(trainer, module)
        if against:
            return f"1 step at a time: {against}"
        group = self.group(module.model, tokens_per_batch, trainer.strategy.root_device)
        if group.most == 1:
            return "1 step at a time: more at once would not be faster"
        text = f"up to {group.most} steps at once"
        if group.unmeasured:
            text = f"up to {MOST_STEPS} steps at once, by their measured time"
        return f"{text}, as CUDA graphs" if self.cuda_graph else text

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Let Lightning's loop take a group of steps before each of its own."""
        loader = trainer.train_dataloader
        if type(loader) is not RandomChunks or reason_against(trainer, pl_module):
            return
        if self.pack and self.pack.joins(trainer, pl_module):  # type: ignore[arg-type]
            return
        group = self.group(pl_module.model, loader.batch_size * loader.block_size, pl_module.device)  # type: ignore[arg-type]
        if group.most == 1:
            return
        self.loop = trainer.fit_loop.epoch_loop
        steps = Steps(trainer, pl_module, loader, self.cuda_graph)  # type: ignore[arg-type]
        advance = self.loop.advance

        def grouped(fetcher: Any) -> None:
            n = 0 if self.loop.restarting else steps_before_due(trainer, group.most)
            if n > 0:
                with group.measured(n):
                    steps.take(n, fetcher)
            advance(fetcher)

        self.loop.advance = grouped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.give_back()

    def give_back(self) -> None:
        if self.loop is not None:
            del self.loop.advance  # the instance attribute, which hides the method
        self.loop = None


def measured_on(device: torch.device) -> bool:
    """Return whether groups on a device are sized by time: on a GPU, launching kernels takes most of a small step."""
    return device.type == "cuda"


class GroupSize:
    """The largest number of steps in a group: fixed, or from the time of the second group, after a warm-up.

    Args:
        most: the number, on `device` only of the first two groups.
        device: where to measure; None: the number is fixed.
    """

    def __init__(self, most: int, device: torch.device | None = None):
        self.most, self.device = most, device
        self.unmeasured = 2 if device else 0

    @contextmanager
    def measured(self, n: int) -> Iterator[None]:
        """Measure a group of n steps, if its time is needed."""
        if not self.unmeasured:
            yield
            return
        start = time.perf_counter()
        yield
        if self.device and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.unmeasured -= 1
        if not self.unmeasured:
            seconds = (time.perf_counter() - start) / n
            self.most = max(2, min(MOST_STEPS, int(GROUP_SECONDS / seconds)))


def steps_before_due(trainer: Any, most: int) -> int:
    """Return the number of steps before the next one that Lightning must take, `most` - 1 at most."""
    loop, per_step = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
    made, made_in_all, step = loop.batch_progress.current.ready, loop.batch_progress.total.ready, loop.global_step
    if made % per_step or skips_backward(trainer):
        return 0
    batches = [trainer.num_training_batches - made]  # Lightning takes the last batch of an epoch
    if trainer.enable_validation and trainer.val_check_batch:
        since = made_in_all if trainer.check_val_every_n_epoch is None else made
        batches.append(trainer.val_check_batch - since % trainer.val_check_batch)
    due = [math.ceil(n / per_step) for n in batches if n < math.inf]
    due.append(trainer.log_every_n_steps - logged_steps(trainer) % trainer.log_every_n_steps)
    if trainer.max_steps > 0:
        due.append(trainer.max_steps - step)
    due += [every - step % every for callback in trainer.callbacks if (every := steps_between(callback))]
    return min(most, *due) - 1


class Steps:
    """Optimizer steps of a plain loop that update Lightning's counters."""

    def __init__(self, trainer: Any, module: LanguageModel, loader: RandomChunks, cuda_graph: bool):
        self.trainer = trainer
        self.module = module
        self.travel = loader.ids.device != module.device  # copy batches to the GPU: the corpus does not fit there
        self.shortcut = table_gradient(trainer, module, loader.batch_size * loader.block_size)
        self.backward = self.shortcut or self.autograd
        self.optimizer = trainer.optimizers[0]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.callbacks = [c for c in trainer.callbacks if isinstance(c, AtSteps)]
        self.clips = self.trainer.gradient_clip_val is not None
        self.graph = CUDAGraph(self.step, [self.optimizer], module.device) if cuda_graph else None
        self.k = 0  # the number of the next batch

    def take(self, n: int, fetcher: Any) -> None:
        """Take n steps on the batches that Lightning would have fetched for them."""
        trainer, loop, per_step = self.trainer, self.trainer.fit_loop.epoch_loop, self.trainer.accumulate_grad_batches
        batches: Iterator[Batch] = batches_of(fetcher)
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step"]
        for callback in self.callbacks:
            callback.before_steps(trainer, self.module)
        losses, first = [], loop.batch_progress.total.ready
        with torch.set_grad_enabled(not self.shortcut):
            for self.k in range(first, first + n * per_step, per_step):
                fetched = [next(batches) for _ in range(per_step)]
                if self.travel:
                    fetched = [self.module.transfer_batch_to_device(b, self.module.device, 0) for b in fetched]
                if not self.shortcut:  # it has no dropout
                    self.module.seed_batch(self.k)
                # The next replay of a graph overwrites its loss.
                losses.append(self.graph(fetched).clone() if self.graph else self.step(fetched))
                for scheduler in schedulers:
                    scheduler.step()
        count_steps(trainer, n, n * per_step, len(schedulers))
        fetcher.fetched += n * per_step
        for callback in self.callbacks:
            callback.after_steps(trainer, self.module, losses)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Take one optimizer step on the mean loss of consecutive batches. Returns the loss of the last one."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.backward(batches)
        if self.clips:
            trainer = self.trainer
            self.module.clip_gradients(self.optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        self.optimizer.step()
        return loss

    def autograd(self, batches: Sequence[Batch]) -> Tensor:
        """Add up the gradients of batches, each divided by their number. Returns the loss of the last one."""
        for i, (x, y) in enumerate(batches):
            if i > 0:  # `take` seeds the first, outside of a captured graph
                self.module.seed_batch(self.k + i)
            # A new context for each batch, because autocast caches the weights.
            with self.trainer.precision_plugin.train_step_context():
                loss = self.module.mean_loss(self.module.model, x, y) / len(batches)
            loss.backward()
        return loss.detach() * len(batches)

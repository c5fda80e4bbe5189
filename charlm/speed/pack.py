"""Several runs of one shape trained together: one step computes the gradients of all of them at once.

Each run keeps its own Trainer, callbacks, loggers and folder. Lightning's loop of one run is entered within that of
the run before; the innermost takes the steps of all. After each step that Lightning would take itself, every run does
what its own loop would do then: it calls the hooks, logs, validates and saves.

For bigrams all of it is bitwise equal to running alone, and for GPTs within rounding (tests/test_pack.py).
"""

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from charlm.callbacks import Attention, BigramTable, Checkpoint, Progress, Recorder, Samples
from charlm.callbacks.at_steps import AtSteps
from charlm.data.chunks import RandomChunks
from charlm.internals.lightning import count_own_step, count_steps, fetcher_of, step_metrics
from charlm.logger import CSV, TensorBoard
from charlm.module import Batch, LanguageModel
from charlm.optimizer.adamw import AdamW
from charlm.speed.grouped_steps import MOST_STEPS, GroupedSteps, steps_before_due
from charlm.speed.packed_steps import Steps
from charlm.speed.stacked_gpt import stacks
from charlm.speed.table_gradient import table_gradient

# A pack knows what these do between two steps. With any other, a run trains alone.
CALLBACKS = {Attention, BigramTable, Checkpoint, Progress, Recorder, Samples, GroupedSteps}
LOGGERS = {CSV, TensorBoard}


class Pack:
    """Runs that train together in this process.

    Args:
        starts: start each run; return when it has ended, in whatever way.
    """

    def __init__(self, starts: Sequence[Callable[[], None]]):
        self.starts = iter(starts)
        self.lanes: list[Lane] = []
        self.trained = False

    def run(self) -> None:
        """Start the runs that have not begun, one within the other, unless a signal ends all."""
        for start in self.starts:
            start()
            if any(lane.recorder.stop.received for lane in self.lanes):
                return

    def joins(self, trainer: Any, module: LanguageModel) -> bool:
        """Let a run train with the others if it fits; its loop then waits for those after it."""
        if not fits(trainer, module):
            return False
        lane = Lane(trainer, module)
        if self.lanes and not lane.like(self.lanes[0]):
            return False
        self.lanes.append(lane)

        def advance() -> None:
            del trainer.fit_loop.advance  # the instance attribute, which hides the method
            self.run()
            if not self.trained:  # no run within this one has taken the steps
                self.trained = True
                self.train()
            lane.loops.close()
            if lane.error:
                raise lane.error

        trainer.fit_loop.advance = advance
        return True

    def train(self) -> None:
        """Take all steps of all runs. What ends a run early is raised in its own loop, later."""
        try:
            for lane in self.lanes:
                with lane.responsible():
                    lane.begin()
            while left := [lane for lane in self.lanes if lane.due and not lane.error]:
                steps = Steps(left)
                while all(lane.due and not lane.error for lane in left):
                    losses = steps.take(min(lane.due for lane in left))
                    self.pass_on_signals()
                    for lane, of_lane, batch in zip(left, losses, steps.newest(), strict=True):
                        with lane.responsible():
                            lane.advance(of_lane, batch)
        except BaseException as error:  # a second Ctrl-C, or a defect
            for lane in self.lanes:
                lane.error = lane.error or error

    def pass_on_signals(self) -> None:
        """Let all runs stop on a signal, which only the innermost has received."""
        stops = [lane.recorder.stop for lane in self.lanes]
        received = max(stop.received for stop in stops)
        for stop in stops:
            stop.received = received


def fits(trainer: Any, module: LanguageModel) -> bool:
    """Return whether a run is a bigram on a CPU or a GPT, and has nothing that a pack does not know."""
    kinds = {type(c) for c in trainer.callbacks}
    return bool(
        Recorder in kinds <= CALLBACKS
        and {type(logger) for logger in trainer.loggers} <= LOGGERS
        and type(trainer.train_dataloader) is RandomChunks
        and [type(optimizer) for optimizer in trainer.optimizers] == [AdamW]
        and trainer.global_step == 0
        and trainer.max_steps > 0
        and (is_table(trainer, module) or stacks(trainer, module))
    )


def is_table(trainer: Any, module: LanguageModel) -> bool:
    """Return whether a run trains a bigram on a CPU, whose steps in a pack are bitwise what they are alone."""
    loader = trainer.train_dataloader
    simple = module.device.type == "cpu" and trainer.gradient_clip_val is None
    return simple and table_gradient(trainer, module, loader.batch_size * loader.block_size) is not None


class Lane:
    """A run in a pack: Lightning's loops over epochs and batches, around steps that are taken for it.

    Args:
        trainer: at the beginning of its fit.
    """

    def __init__(self, trainer: Any, module: LanguageModel):
        self.trainer, self.module = trainer, module
        self.loader: RandomChunks = trainer.train_dataloader
        self.optimizer: AdamW = trainer.optimizers[0]
        self.is_table = is_table(trainer, module)
        speed = next(c for c in trainer.callbacks if isinstance(c, GroupedSteps))
        group = speed.group(module.model, self.loader.batch_size * self.loader.block_size, module.device)
        self.most = MOST_STEPS if group.unmeasured else group.most  # steps between two calls of hooks
        self.schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step"]
        self.recorder: Recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
        self.outputs = Outputs()
        self.loops = self.epochs()
        self.error: BaseException | None = None
        self.due = 0  # steps up to the next one that concerns more than the weights; 0: none is left
        self.lr = 0.0  # of the newest step
        self.taken: tuple[Sequence[Tensor], Batch]

    def like(self, other: "Lane") -> bool:
        """Return whether both have one shape, and see batches of one size, of one text."""
        shapes = [
            (
                lane.loader.batch_size,
                lane.loader.block_size,
                lane.is_table,
                lane.trainer.precision,
                lane.trainer.gradient_clip_val,
                {name: parameter.shape for name, parameter in lane.module.model.named_parameters()},
            )
            for lane in (self, other)
        ]
        return shapes[0] == shapes[1] and torch.equal(self.loader.ids, other.loader.ids)

    @contextmanager
    def responsible(self) -> Iterator[None]:
        """Keep what is raised for the run's own loop, and send what is printed to the run's own files."""
        try:
            with self.outputs.restored():
                yield
        except BaseException as error:
            self.error = error

    def begin(self) -> None:
        self.due = next(self.loops)

    def advance(self, losses: Sequence[Tensor], batch: Batch) -> None:
        """Do all that follows steps with these losses, whose last batch is given."""
        self.taken = losses, batch
        self.due = next(self.loops, 0)

    def epochs(self) -> Generator[int, None, None]:
        """Run Lightning's loops from the first batch to the last. Yields the number of steps that are due."""
        fit, fetcher = self.trainer.fit_loop, fetcher_of(self.trainer)
        loop = fit.epoch_loop
        while True:
            loop.reset()
            loop.on_run_start(fetcher)
            while not loop.done:
                yield steps_before_due(self.trainer, self.most) + 1
                self.advance_batch(*self.taken)
                loop.on_advance_end(fetcher)  # validates if that is due
                loop.on_iteration_done()
            if self.trainer.global_step >= self.trainer.max_steps:
                return  # Lightning ends the last epoch
            fit.on_advance_end()
            fit.on_iteration_done()
            fit.on_advance_start()

    def advance_batch(self, losses: Sequence[Tensor], batch: Batch) -> None:
        """Do what Lightning's `advance` does around the last of several steps, in its order."""
        trainer, module, grouped = self.trainer, self.module, len(losses) - 1
        if grouped:
            count_steps(trainer, grouped, grouped, len(self.schedulers))
            for callback in trainer.callbacks:
                if isinstance(callback, AtSteps):
                    callback.after_steps(trainer, module, losses[:-1])
        with step_metrics(trainer, module, batch):
            module.log("train/loss", losses[-1])
            self.recorder.on_before_backward(trainer, module, losses[-1])
            if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
                module.log("train/lr", self.lr)
            count_own_step(trainer, len(self.schedulers))
            outputs = {"loss": losses[-1]}
            for callback in trainer.callbacks:
                callback.on_train_batch_end(trainer, module, outputs, batch, 0)
            module.on_train_batch_end(outputs, batch, 0)


class Outputs:
    """Where this process prints and logs to at present."""

    def __init__(self) -> None:
        self.handlers = [*logging.getLogger().handlers]
        self.descriptors = {number: os.dup(number) for number in (1, 2)}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Print and log to there again, for a while."""
        now = Outputs()
        self.use()
        try:
            yield
        finally:
            now.use()
            now.close()

    def use(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in self.descriptors.items():
            os.dup2(descriptor, number)
        logging.getLogger().handlers[:] = self.handlers

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def return_to(self) -> None:
        """Print and log to there for good, and close the files of the loggers that take its place."""
        others = [handler for handler in logging.getLogger().handlers if handler not in self.handlers]
        self.use()
        self.close()
        for handler in others:
            handler.close()

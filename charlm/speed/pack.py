"""Several runs of one shape trained together: one step computes the gradients of all tables at once.

Each run keeps its own Trainer, callbacks, loggers and folder. Lightning's loop of one run is entered within that of
the run before; the innermost takes the steps of all. After each step that Lightning would take itself, every run does
what its own loop would do then: it calls the hooks, logs, validates and saves.

All of it is bitwise equal to running alone (tests/test_pack.py).
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
from charlm.data.chunks import BATCHES_PER_DRAW, RandomChunks, gather_chunks
from charlm.internals.lightning import count_own_step, count_steps, fetcher_of, step_metrics
from charlm.internals.torch import add_to_all, fused_adamw, log_softmax_backward
from charlm.logger import CSV, TensorBoard
from charlm.module import Batch, LanguageModel
from charlm.optimizer.adamw import AdamW
from charlm.speed.grouped_steps import MOST_STEPS, GroupedSteps, steps_before_due
from charlm.speed.table_gradient import table_gradient

# A pack knows what these do between two steps. With any other, a run trains alone.
CALLBACKS = {Attention, BigramTable, Checkpoint, Progress, Recorder, Samples, GroupedSteps}
LOGGERS = {CSV, TensorBoard}
TOKENS_AT_ONCE = 65_536  # of all runs, which are gathered together

Settings = tuple[Any, ...]  # of an optimizer: lr, betas, weight_decay, eps


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
    """Return whether a run is a bigram on a CPU, and has nothing that a pack does not know."""
    loader = trainer.train_dataloader
    kinds = {type(c) for c in trainer.callbacks}
    fresh = trainer.global_step == 0 and trainer.max_steps > 0 and trainer.gradient_clip_val is None
    return bool(
        Recorder in kinds <= CALLBACKS
        and {type(logger) for logger in trainer.loggers} <= LOGGERS
        and type(loader) is RandomChunks
        and [type(optimizer) for optimizer in trainer.optimizers] == [AdamW]
        and fresh
        and module.device.type == "cpu"
        and table_gradient(trainer, module, loader.batch_size * loader.block_size)
    )


class Lane:
    """A run in a pack: Lightning's loops over epochs and batches, around steps that are taken for it.

    Args:
        trainer: at the beginning of its fit.
    """

    def __init__(self, trainer: Any, module: LanguageModel):
        self.trainer, self.module = trainer, module
        self.loader: RandomChunks = trainer.train_dataloader
        self.optimizer: AdamW = trainer.optimizers[0]
        self.table: torch.nn.Parameter = self.optimizer.param_groups[0]["params"][0]
        self.schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step"]
        self.recorder: Recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
        self.outputs = Outputs()
        self.loops = self.epochs()
        self.error: BaseException | None = None
        self.due = 0  # steps up to the next one that concerns more than the weights; 0: none is left
        self.lr = 0.0  # of the newest step
        self.taken: tuple[Sequence[Tensor], Batch]

    def like(self, other: "Lane") -> bool:
        """Return whether both see batches of one size, of one text."""
        mine, theirs = self.loader, other.loader
        shapes = [(loader.batch_size, loader.block_size) for loader in (mine, theirs)]
        return shapes[0] == shapes[1] and self.table.shape == other.table.shape and torch.equal(mine.ids, theirs.ids)

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
                yield steps_before_due(self.trainer, MOST_STEPS) + 1
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


class Steps:
    """The steps of several runs: one call per operation for the gradients of all tables.

    Shape legend: R runs, V symbols, B chunks in a batch, T = block_size.
    """

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes, loader = lanes, lanes[0].loader
        self.tables = torch.stack([lane.table.data for lane in lanes])  # (R, V, V)
        for lane, table in zip(lanes, self.tables, strict=True):
            lane.table.data = table  # a view, so that everything sees the newest weights
        R, V, _ = self.tables.shape
        tokens = loader.batch_size * loader.block_size
        self.together = max(1, TOKENS_AT_ONCE // (R * tokens))  # steps whose batches are gathered together
        self.count = torch.tensor(tokens)
        self.of_pairs = (-torch.ones(()) / self.count).expand(R * tokens)
        self.first_pair = (torch.arange(R) * V * V)[:, None]
        self.k = lanes[0].trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.batch: Batch  # of all runs, (R, B, T) each
        self.settings: Sequence[Settings] = ()  # of the optimizers, at the newest step
        self.alike: list[tuple[Settings, list[int], list[list[Tensor]]]] = []  # lanes and states of equal settings
        self.known: dict[tuple[int, ...], list[list[Tensor]]] = {}  # by lanes

    @torch.no_grad()
    def take(self, n: int) -> list[Sequence[Tensor]]:
        """Take n steps, and return their losses for each run."""
        losses = [self.step(x, y) for x, y in self.batches(n)]  # (R,) each
        return [of_run.unbind() for of_run in torch.stack(losses, 1)]

    def newest(self) -> list[Batch]:
        """Return the newest batch of each run, (B, T) each."""
        return [*zip(*self.batch, strict=True)]

    def batches(self, n: int) -> Iterator[Batch]:
        """Return the next n batches of all runs, (R, B, T) each."""
        end, loader = self.k + n, self.lanes[0].loader
        while self.k < end:
            draw, row = divmod(self.k, BATCHES_PER_DRAW)
            m = min(self.together, end - self.k, BATCHES_PER_DRAW - row)
            starts = torch.stack([lane.loader.draw(draw)[row : row + m] for lane in self.lanes], 1)  # (m, R, B)
            xs, ys = gather_chunks(loader.ids, starts, loader.block_size)
            for self.batch in zip(xs, ys, strict=True):
                yield self.batch
            self.k += m

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step on x, y (R, B, T) -> losses (R,); see `charlm.speed.table_gradient`."""
        R, V, _ = self.tables.shape
        log_p = self.tables.log_softmax(-1)  # (R, V, V)
        pairs = torch.add(y, x, alpha=V).view(R, -1) + self.first_pair  # (R, B * T)
        of_log_p = log_p.new_zeros(log_p.numel()).scatter_add_(0, pairs.view(-1), self.of_pairs).view_as(log_p)
        self.update(log_softmax_backward(of_log_p, log_p, torch.float32))
        return log_p.take(pairs).neg_().sum(1) / self.count

    def update(self, gradients: Tensor) -> None:
        """Update each table by its own optimizer and schedule; equal settings share one call of the kernel."""
        groups = [lane.optimizer.param_groups[0] for lane in self.lanes]
        settings = [(group["lr"], group["betas"], group["weight_decay"], group["eps"]) for group in groups]
        for lane, (lr, *_) in zip(self.lanes, settings, strict=True):
            lane.lr = lr
        if all(lane.optimizer.kept for lane in self.lanes):
            self.update_together(gradients, settings)
        else:  # the first step, which creates the averages
            for lane, gradient in zip(self.lanes, gradients, strict=True):
                lane.table.grad = gradient
                lane.optimizer.step()
                lane.table.grad = None
        for lane in self.lanes:
            for scheduler in lane.schedulers:
                scheduler.step()

    def update_together(self, gradients: Tensor, settings: Sequence[Settings]) -> None:
        """Call the kernel once for all optimizers of equal settings."""
        if settings != self.settings:
            self.settings = settings
            alike: dict[Settings, list[int]] = {}
            for i, one in enumerate(settings):
                alike.setdefault(one, []).append(i)
            self.alike = [(one, members, self.states(tuple(members))) for one, members in alike.items()]
        each = gradients.unbind()
        for (lr, (beta1, beta2), weight_decay, eps), members, (tables, averages, squares, steps) in self.alike:
            add_to_all(steps, 1)
            fused_adamw(
                tables,
                [each[i] for i in members],
                averages,
                squares,
                [],
                steps,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )

    def states(self, members: tuple[int, ...]) -> list[list[Tensor]]:
        """Return the tables, both averages and the step counters of the optimizers of these lanes."""
        if members not in self.known:
            [kept] = zip(*(self.lanes[i].optimizer.kept for i in members), strict=True)
            columns = [*zip(*kept, strict=True)][1:]
            self.known[members] = [[part for parts in column for part in parts] for column in columns]
        return self.known[members]


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

"""The steps of several runs of one shape: one call per operation for the weights of all."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from charlm.data.chunks import BATCHES_PER_DRAW, gather_chunks
from charlm.internals.torch import add_to_all, fused_adamw
from charlm.module import Batch
from charlm.speed.stacked_gpt import StackedGradient
from charlm.speed.table_gradient import TablesGradient

if TYPE_CHECKING:
    from charlm.speed.pack import Lane

TOKENS_AT_ONCE = 65_536  # of all runs, which are gathered together

Settings = tuple[Any, ...]  # lr, betas, weight_decay and eps of a group of parameters
Member = tuple[int, int]  # a run, and a group of parameters of its optimizer


class Steps:
    """Takes steps of several runs together.

    Shape legend: R runs, B chunks in a batch, T = block_size.
    """

    def __init__(self, lanes: Sequence["Lane"]):
        self.lanes, loader, module = lanes, lanes[0].loader, lanes[0].module
        self.device = module.device
        self.weights: dict[str, Tensor] = {}  # (R, ...) each
        for same in zip(*(lane.module.model.named_parameters() for lane in lanes), strict=True):
            name = same[0][0]
            self.weights[name] = torch.stack([parameter.data for _, parameter in same])
            for (_, parameter), weight in zip(same, self.weights[name], strict=True):
                parameter.data = weight  # a view, so that everything sees the newest weights
        place = {id(p): i for i, p in enumerate(module.model.parameters())}
        # For each group of the optimizer, where its parameters are among the weights.
        self.places = [[place[id(p)] for p in group["params"]] for group in lanes[0].optimizer.param_groups]
        tokens = loader.batch_size * loader.block_size
        self.gradients: TablesGradient | StackedGradient
        if lanes[0].is_table:
            [tables] = self.weights.values()
            self.gradients = TablesGradient(tables, tokens)
        else:
            self.gradients = StackedGradient(lanes[0].trainer, module, self.weights)
        self.together = max(1, TOKENS_AT_ONCE // (len(lanes) * tokens))  # steps whose batches are gathered together
        self.k = lanes[0].trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.batch: Batch  # of all runs, (R, B, T) each
        self.settings: Sequence[Settings] = ()  # of all groups of all runs, at the newest step
        self.alike: list[tuple[Settings, list[Member], list[list[Tensor]]]] = []  # with the states of the optimizers
        self.known: dict[tuple[Member, ...], list[list[Tensor]]] = {}

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
            for batch in zip(xs.to(self.device), ys.to(self.device), strict=True):
                self.batch = batch
                yield batch
            self.k += m

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step on x and y (R, B, T) -> losses (R,)."""
        gradients, losses = self.gradients(x, y)
        self.update([gradient.unbind() for gradient in gradients])
        return losses

    def update(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Update all weights by the optimizer and the schedule of each run; equal settings share a call of the kernel.

        Args:
            gradients: one for each weight and run.
        """
        groups = [group for lane in self.lanes for group in lane.optimizer.param_groups]
        settings = [(group["lr"], group["betas"], group["weight_decay"], group["eps"]) for group in groups]
        for lane in self.lanes:
            lane.lr = lane.optimizer.param_groups[0]["lr"]
        if all(lane.optimizer.kept for lane in self.lanes):
            self.update_together(gradients, settings)
        else:  # the first step, which creates the averages
            for i, lane in enumerate(self.lanes):
                for parameter, of_runs in zip(lane.module.model.parameters(), gradients, strict=True):
                    parameter.grad = of_runs[i]
                lane.optimizer.step()
                lane.optimizer.zero_grad()
        for lane in self.lanes:
            for scheduler in lane.schedulers:
                scheduler.step()

    def update_together(self, gradients: Sequence[Sequence[Tensor]], settings: Sequence[Settings]) -> None:
        """Call the kernel once for all groups of equal settings."""
        if settings != self.settings:
            self.settings = settings
            alike: dict[Settings, list[Member]] = {}
            each = [(i, group) for i in range(len(self.lanes)) for group in range(len(self.places))]
            for member, one in zip(each, settings, strict=True):
                alike.setdefault(one, []).append(member)
            self.alike = [(one, members, self.states(tuple(members))) for one, members in alike.items()]
        for (lr, (beta1, beta2), weight_decay, eps), members, (weights, averages, squares, steps) in self.alike:
            add_to_all(steps, 1)
            fused_adamw(
                weights,
                [gradients[place][i] for i, group in members for place in self.places[group]],
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

    def states(self, members: tuple[Member, ...]) -> list[list[Tensor]]:
        """Return the weights, both averages and the step counters of these groups."""
        if members not in self.known:
            kept = [self.lanes[i].optimizer.kept[group][1:] for i, group in members]
            self.known[members] = [[part for parts in column for part in parts] for column in zip(*kept, strict=True)]
        return self.known[members]

"""An exponential moving average of the weights (Polyak and Juditsky 1992; Ruppert 1988).

Not torch's AveragedModel nor Lightning's WeightAveraging: both copy the whole module.
"""

from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from charlm.callbacks.at_steps import AtSteps
from charlm.internals.torch import lerp_all

KEY = "ema"  # of a checkpoint


class EMA(AtSteps):
    """Validations, dashboard, final figures and checkpoints use the averaged weights; training continues with its own.

    A checkpoint stores the average as its weights, and the training weights separately to resume from.

    The n-th update keeps at most (n - 1) / (n + 8) of the average, so that it reaches back over about a ninth of a
    short run and not to the initial weights. TensorFlow's
    ExponentialMovingAverage introduced such a ramp, as `num_updates`.

    Args:
        decay: weight of the old average per step: it reaches back over about 1 / (1 - decay) steps.
        every_n_steps: optimizer steps between updates of the average.
    """

    every_n_steps: int

    def __init__(self, decay: Annotated[float, Gt(0), Lt(1)] = 0.999, every_n_steps: Annotated[int, Ge(1)] = 10):
        self.decay, self.every_n_steps = decay, every_n_steps
        self.updates = self.updated_at = 0
        self.average: list[Tensor] = []  # in the order of the model's parameters
        self.raw: list[Tensor] = []  # the training weights, while the model has the average

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = [average.to(pl_module.device) for average in self.average]  # loaded from a checkpoint, if any

    def before_steps(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take_out(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.take_out(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.update(trainer, pl_module)

    # Swap the average in before validation and out before the next step, so callback order does not matter.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.put_in(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.put_in(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.put_in(pl_module)  # also if the run was resumed at its last step

    @torch.no_grad()
    def update(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update the average if the step is due, once per step."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self.updated_at:
            return
        weights = [wide(p) for p in pl_module.parameters()]
        if self.updates:
            kept = min(self.decay**self.every_n_steps, self.updates / (self.updates + 9))
            lerp_all(self.average, weights, 1 - kept)
        else:
            self.average = [weight.clone() for weight in weights]
        self.updates, self.updated_at = self.updates + 1, step

    @torch.no_grad()
    def put_in(self, pl_module: L.LightningModule) -> None:
        """Copy the average into the parameters, to whose memory optimizers and captured graphs refer."""
        if self.raw or not self.average:
            return
        self.raw = [p.clone() for p in pl_module.parameters()]
        for p, average in zip(pl_module.parameters(), self.average, strict=True):
            p.copy_(average)

    @torch.no_grad()
    def take_out(self, pl_module: L.LightningModule) -> None:
        if self.raw:
            for p, raw in zip(pl_module.parameters(), self.raw, strict=True):
                p.copy_(raw)
        self.raw = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.raw:
            self.update(trainer, pl_module)  # if due: an earlier callback may save a checkpoint at this step
        if not self.average:
            return
        weights = checkpoint["state_dict"]
        raw = weights | named(pl_module, self.raw) if self.raw else weights
        checkpoint["state_dict"] = weights | named(pl_module, self.average)
        checkpoint[KEY] = {"raw": raw, "updates": self.updates, "updated_at": self.updated_at}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:  # the run had no average: start one here
            return
        kept, average = checkpoint[KEY], checkpoint["state_dict"]
        self.updates, self.updated_at = kept["updates"], kept["updated_at"]
        self.average = [wide(average[name]).clone() for name, _ in pl_module.named_parameters()]
        pl_module.load_state_dict(kept["raw"])


def wide(parameter: Tensor) -> Tensor:
    """A half-precision average would round its updates away."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def named(module: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Return tensors, given in the order of the parameters, under the parameters' names."""
    of = {id(p): tensor for p, tensor in zip(module.parameters(), tensors, strict=True)}
    return {name: of[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}

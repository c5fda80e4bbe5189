"""The one LightningModule: step, loss and logging for every model."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from charlm.data.chunks import EvalBatch, Windows
from charlm.evaluate import Score, window_losses

# What a validation puts on the curves, of the exact figures.
VALIDATION = ("val/loss", "val/bits_per_char", "val/perplexity")


class NoStepHooks:
    """Spares a small model the hooks that Lightning enters around every step, empty or not.

    There are six of the module and of each callback, which together take longer than the step itself. A hook that is
    None is not entered; a subclass defines those that it needs.
    """

    on_train_batch_start: Any = None
    on_before_zero_grad: Any = None
    on_before_backward: Any = None
    on_after_backward: Any = None
    on_before_optimizer_step: Any = None
    on_train_batch_end: Any = None


class LanguageModel(NoStepHooks, L.LightningModule):
    """Trains a model to predict the next character.

    Args:
        model: forward(idx (B, T)) -> logits (B, T, V).
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule from the optimizer, or None for a constant rate.
        record: what a later command needs to know of this run, in plain types; saved in every checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler | None],
        record: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.record = record or {}
        self.validated_at = -1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, T) each
        logits = self.model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        if (batch_idx + 1) % self.log_every_n_batches == 0:
            self.log_training(loss.item())
        return loss

    def on_train_start(self) -> None:
        # To log costs a small model more than its step: it is done when it is due, and not at every step.
        trainer: Any = self.trainer
        self.log_every_n_batches = trainer.log_every_n_steps * trainer.accumulate_grad_batches

    def log_training(self, loss: float) -> None:
        figures = {"train/loss": loss, "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
        for logger in self.loggers:  # not self.log: it costs as much as several steps of a small model
            logger.log_metrics(figures, self.global_step + 1)

    def on_validation_epoch_start(self) -> None:
        self.windows: Windows = self.trainer.val_dataloaders  # type: ignore[assignment]
        self.window_nll = torch.zeros(self.windows.n_windows, device=self.device)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.window_nll[batch.windows] += window_losses(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        # Every window was scored by one rank and is zero on the others: the sum is exact, whatever the world size.
        window_nll = self.trainer.strategy.reduce(self.window_nll, reduce_op="sum")
        score = Score.of(window_nll, self.windows.counts())
        figures = score.figures("val")
        # Lightning takes "step" as that of the others, which would else be one behind.
        told = {name: figures[name] for name in VALIDATION} | {"step": self.global_step}
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        self.log_dict({name: torch.tensor(value, dtype=dtype) for name, value in told.items()})
        self.validated_at = self.global_step

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model.parameters())
        scheduler = self.make_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["charlm"] = self.record

    # What follows only spares a small model more of what Lightning does around every step.

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch  # there is no such hook here, for which Lightning would look in three places

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        if batch[0].device == self.device:  # made there already, unless the text does not fit
            return batch
        return super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of every hook it enters and leaves; nn.Module would look for parameters in it.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

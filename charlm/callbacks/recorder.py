"""Record every run: all losses, all validations and the training speed; end it at a bad loss, a signal or `stop_at`."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as SavesLast
from torch import Tensor

from charlm.callbacks.at_steps import AtSteps
from charlm.callbacks.clock import Clock
from charlm.callbacks.loss_files import Losses, Validations, check_weights
from charlm.callbacks.stop import Stop


class Recorder(AtSteps, SavesLast):
    """All that `train.py` records about a run, in one callback, so that each hook shows its order.

    Lightning calls subclasses of its own Checkpoint after all other callbacks, wherever they are listed. Of these,
    the recorder must be listed after `charlm.callbacks.Checkpoint`, because it may end the process.

    Args:
        run_dir: the folder for `losses.f32` and `validations.csv`.
        stop_at: stop after this step, save, and exit with code 0.

    Raises:
        Diverged: if a loss or a weight is NaN or infinite, in all processes together.
        DiskError: if a file cannot be written.
    """

    def __init__(self, run_dir: str, stop_at: int | None = None):
        self.every_n_steps = stop_at
        self.losses, self.validations = Losses(run_dir), Validations(run_dir)
        self.clock, self.stop = Clock(), Stop(stop_at)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations.open(trainer)
        self.losses.open(trainer)
        self.stop.listen(trainer)
        self.clock.start(trainer)

    def after_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, losses: Sequence[Tensor]) -> None:
        self.losses.add(losses, trainer.global_step)

    def on_before_backward(self, trainer: Any, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.losses.newest = loss.detach() * trainer.accumulate_grad_batches  # undo Lightning's division

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        self.losses.end_step(trainer)
        self.clock.end_step(trainer, pl_module, batch)
        self.stop.end_step(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:  # before training and its clock
            return
        self.validations.add(trainer, self.clock.seconds)
        self.clock.resume()
        self.stop.end_validation(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the files up to the step of the checkpoint, and refuse to save a run that has diverged."""
        self.validations.add(trainer, self.clock.seconds)
        self.losses.check(trainer)
        check_weights(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.check(trainer)
        check_weights(trainer, pl_module)
        self.stop.end_training(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop.restore_handlers()
        self.losses.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.losses.close()

    def state_dict(self) -> dict[str, Any]:
        return self.clock.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.load_state_dict(state_dict)

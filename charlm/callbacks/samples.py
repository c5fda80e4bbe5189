"""Text that the model writes, at every validation, so that one can read it improve."""

from typing import Annotated

import lightning as L
import torch
from annotated_types import Ge
from lightning.pytorch.loggers import TensorBoardLogger

from charlm.generate import write


class Samples(L.Callback):
    """Puts a sample on the dashboard (TensorBoard's Text tab).

    Args:
        length: characters.
        seed: of the sampling, which has a generator of its own: watching a run does not change it.
    """

    def __init__(self, length: Annotated[int, Ge(1)] = 300, seed: Annotated[int, Ge(0)] = 1337):
        self.length, self.seed = length, seed

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        text = "".join(write(pl_module.model, tokenizer, self.length, seed=self.seed))
        # Indented by four, Markdown shows text as it stands.
        shown = "\n".join("    " + line for line in text.split("\n"))
        trainer.logger.experiment.add_text("sample", shown, trainer.global_step)

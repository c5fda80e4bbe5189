"""Samples of text during training."""

from typing import Annotated

import lightning as L
from annotated_types import Ge, Le
from torch import nn

from charlm.callbacks.dashboard import DashboardCallback
from charlm.generate import continuation
from charlm.logger import TensorBoard

COLUMNS = 100  # width of a line in the Text tab, which does not wrap


class Samples(DashboardCallback):
    """Puts a sample on the dashboard (TensorBoard's Text tab).

    Args:
        length: characters of a sample on the dashboard.
        seed: seed of the sampling, which never changes training. It has its own generator.
    """

    def __init__(self, length: Annotated[int, Ge(1), Le(1_000_000)] = 200, seed: Annotated[int, Ge(0)] = 1337):
        self.length, self.seed = length, seed

    def show(self, trainer: L.Trainer, model: nn.Module, board: TensorBoard) -> None:
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        text = continuation(model, tokenizer, self.length, seed=self.seed)
        board.experiment.add_text("sample", as_markdown(text), trainer.global_step)


def as_markdown(text: str) -> str:
    """Return Markdown that shows a text literally: indented by four; long lines are broken."""
    lines = (line[i : i + COLUMNS] for line in text.split("\n") for i in range(0, max(1, len(line)), COLUMNS))
    return "\n".join("    " + line for line in lines)

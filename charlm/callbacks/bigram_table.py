"""What follows each character: the model's probabilities as a heat map, beside those that were counted."""

from typing import Annotated

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 11  # pixels of one probability; room for one letter on the axes
MARGIN = 34
GAP = 12
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
# Five colours of Matplotlib's viridis (Smith and van der Walt, 2015): even to the eye, and readable in grey.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)
NAMES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "sp"}


class BigramTable(L.Callback):
    """Draws P(next | last) at every validation. Any model has one: its logits after a single character.

    Args:
        most_characters: the most frequent ones are shown, so that the picture stays readable for any alphabet.
    """

    def __init__(self, most_characters: Annotated[int, Ge(2)] = 80):
        self.most_characters = most_characters

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.shown, self.counted = count_table(data.splits["train"], data.tokenizer.vocab_size, self.most_characters)

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        idx = self.shown.to(pl_module.device)
        logits = pl_module.model(idx[:, None])[:, -1]  # (n, V)
        learned = logits.float().softmax(-1)[:, idx].cpu()  # (n, n)
        labels = [*trainer.datamodule.tokenizer.decode(self.shown)]  # type: ignore[attr-defined]
        picture = draw({"learned": learned, "counted": self.counted}, labels)
        trainer.logger.experiment.add_image("bigram_table", picture, trainer.global_step, dataformats="HWC")


def count_table(ids: Tensor, vocab_size: int, most: int) -> tuple[Tensor, Tensor]:
    """The ids of the most frequent characters, in order, (n,), and P(next | last) among them, (n, n)."""
    ids = ids.long()
    frequency = torch.bincount(ids, minlength=vocab_size)
    shown = frequency.topk(min(most, vocab_size)).indices.sort().values
    n = len(shown)
    place = torch.full((vocab_size,), n).index_copy_(0, shown, torch.arange(n))  # n: not shown
    pairs = place[ids[:-1]] * (n + 1) + place[ids[1:]]
    counts = torch.bincount(pairs, minlength=(n + 1) ** 2).view(n + 1, n + 1)[:n].double()
    return shown, (counts / counts.sum(1, keepdim=True).clamp_min(1))[:, :n].float()


def draw(tables: dict[str, Tensor], labels: list[str]) -> np.ndarray:
    """Heat maps side by side, (H, W, 3) uint8: a row for the last character, a column for the next.

    The colour is the square root of the probability, since most of them are small.
    """
    n = len(labels)
    width = (MARGIN + n * CELL + GAP) * len(tables)
    image = Image.new("RGB", (width, MARGIN + n * CELL + GAP), BACKGROUND)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(CELL)
    for t, (title, table) in enumerate(tables.items()):
        left = t * (MARGIN + n * CELL + GAP) + MARGIN
        pen.text((left, 2), f"{title} P(next | last)", INK, font)
        colours = Image.fromarray(colour(table.clamp(0, 1).sqrt().numpy()))
        image.paste(colours.resize((n * CELL, n * CELL), Image.Resampling.NEAREST), (left, MARGIN))
        for i, label in enumerate(labels):
            name = NAMES.get(label, label if label.isprintable() else "?")
            pen.text((left - 4, MARGIN + (i + 0.5) * CELL), name, INK, font, anchor="rm")
            pen.text((left + (i + 0.5) * CELL, MARGIN - 3), name, INK, font, anchor="ms")
    return np.asarray(image)


def colour(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 -> RGB, uint8, by linear steps between the colours of VIRIDIS."""
    places = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values, places, VIRIDIS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)

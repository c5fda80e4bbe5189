"""Heat map of next-character probabilities: the model's next to the counted ones."""

import io
from functools import cache
from typing import Annotated

import lightning as L
import numpy as np
import torch
from annotated_types import Ge, Le
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from charlm.callbacks.dashboard import DashboardCallback
from charlm.data.pairs import Pairs
from charlm.logger import TensorBoard
from charlm.model import device_of

Image.preinit()  # here, and not once more in each job of a sweep

TAG = "what_follows/bigram_table"  # its own group, which TensorBoard sorts behind train and val
CAPTION = "row: last character, column: next character"
LETTER = 11  # pixels of one probability, at least: room for one letter on the axes
SIDE = 480  # pixels of a heat map, at least: room for its titles
LEFT, TOP, GAP, BOTTOM = 24, 44, 24, 40
TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)  # labels on the colour scale
NAMES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "·"}
# Five colours of Matplotlib's viridis (Smith and van der Walt, 2015): even to the eye, and readable in grey.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)
# A picture holds numbers of colours, one byte per pixel, which encodes several times faster than three: those of the
# heat map from 0 to TOP_COLOUR, and above them the greys from ink to paper, between which letters have soft edges.
TOP_COLOUR, INK, PAPER = 191, 192, 255
INK_GREY = 40


class BigramTable(DashboardCallback):
    """Draws P(next | last). Any model has one: its logits after a single character.

    Args:
        most_characters: number of the most frequent characters to show.
    """

    frame: Image.Image | None = None

    def __init__(self, most_characters: Annotated[int, Ge(2), Le(1000)] = 80):
        self.most_characters = most_characters

    def show(self, trainer: L.Trainer, model: nn.Module, board: TensorBoard) -> None:
        if self.frame is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            self.shown, counted = table_of(data.pairs("train"), data.tokenizer.vocab_size, self.most_characters)
            self.frame = frame_of(data.tokenizer.decode(self.shown)).copy()
            paste(self.frame, counted, 1)
        idx = self.shown.to(device_of(model))
        logits = model(idx[:, None])[:, -1]  # (n, V)
        paste(self.frame, logits.float().softmax(-1)[:, idx].cpu(), 0)
        board.log_picture(TAG, png(self.frame), *self.frame.size, trainer.global_step)


def table_of(pairs: Pairs, vocab_size: int, most: int) -> tuple[Tensor, Tensor]:
    """Return the ids of the most frequent characters, sorted, (n,), and P(next | last) among them, (n, n)."""
    first, second, counts = pairs.codes // vocab_size, pairs.codes % vocab_size, pairs.counts.double()
    frequency = torch.bincount(first, counts, vocab_size)
    shown = frequency.topk(min(most, vocab_size)).indices.sort().values
    n = len(shown)
    place = torch.full((vocab_size,), n).index_copy_(0, shown, torch.arange(n))  # n: not shown
    among = torch.bincount(place[first] * (n + 1) + place[second], counts, (n + 1) ** 2).view(n + 1, n + 1)[:n, :n]
    return shown, (among / frequency[shown].clamp_min(1)[:, None]).float()


@cache
def frame_of(labels: str) -> Image.Image:
    """Draw the frame of a run, once for all runs of a process with the same characters."""
    return draw_frame([*labels], ["learned", "counted in the training text"])


def draw_frame(labels: list[str], titles: list[str], caption: str = CAPTION) -> Image.Image:
    """Draw all but the heat maps, which are side by side: axes, a title and the caption over each, the colour scale."""
    cell = cell_of(len(labels))
    side = cell * len(labels)
    image = Image.new("L", (left_of(len(titles), side) - LEFT, TOP + side + BOTTOM), PAPER)
    pen, font, large = ImageDraw.Draw(image), ImageFont.load_default(LETTER), ImageFont.load_default(LETTER + 5)
    for t, title in enumerate(titles):
        left = left_of(t, side)
        pen.text((left, 20), title, INK, large, anchor="ls")
        pen.text((left + side, 20), caption, INK, font, anchor="rs")
        for i, label in enumerate(labels):
            name = NAMES.get(label, label if label.isprintable() else "?")
            middle = (i + 0.5) * cell
            pen.text((left - 4, TOP + middle), name, INK, font, anchor="rm")
            pen.text((left + middle, TOP - 4), name, INK, font, anchor="ms")
    top, length = TOP + side + LETTER, side - 70
    scale = Image.fromarray(np.arange(TOP_COLOUR + 1, dtype=np.uint8)[None])
    image.paste(scale.resize((length, LETTER), Image.Resampling.NEAREST), (LEFT, top))
    for tick in TICKS:
        pen.text((LEFT + tick**0.5 * length, top + 2 * LETTER), f"{tick:g}", INK, font, anchor="ms")
    pen.text((LEFT + side, top + LETTER - 2), "probability", INK, font, anchor="rs")
    return image


def cell_of(n: int) -> int:
    """Return the pixels of one probability among n x n."""
    return max(LETTER, SIDE // n)


def left_of(t: int, side: int) -> int:
    """Return the left edge of heat map t in pixels."""
    return LEFT + t * (side + GAP + LEFT)


def paste(image: Image.Image, table: Tensor, t: int) -> None:
    """Draw one table. The colour is the square root of the probability, since most of them are small."""
    side = len(table) * cell_of(len(table))
    colours = Image.fromarray((table.clamp(0, 1).sqrt() * TOP_COLOUR).round().byte().numpy())
    image.paste(colours.resize((side, side), Image.Resampling.NEAREST), (left_of(t, side), TOP))


def png(image: Image.Image) -> bytes:
    places, reds_greens_blues = np.linspace(0, TOP_COLOUR, len(VIRIDIS)), VIRIDIS.T
    viridis = np.stack([np.interp(np.arange(TOP_COLOUR + 1), places, c) for c in reds_greens_blues], axis=-1)
    greys = np.linspace(INK_GREY, 255, PAPER - INK + 1)[:, None].repeat(3, axis=1)
    image = image.copy()
    image.putpalette(np.concatenate([viridis, greys]).astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "png", compress_level=3)  # the best trade of size for time
    return file.getvalue()

"""Attention maps of a GPT: which characters each head looks at."""

import math
from typing import Annotated, Any, cast

import lightning as L
import torch
from annotated_types import Ge, Le
from PIL import Image
from torch import Tensor, nn

from charlm.callbacks.bigram_table import PAPER, draw_frame, paste, png
from charlm.callbacks.dashboard import DashboardCallback
from charlm.data import CharDataModule
from charlm.logger import TensorBoard
from charlm.model import device_of
from charlm.model.gpt import GPT, Block

TAG = "what_follows/attention"
CAPTION = "row: a character, column: what it looks at"


class Attention(DashboardCallback):
    """Draws the attention of a GPT on the beginning of val; of other models, nothing.

    Args:
        most_characters: number of the first characters of val to show.
    """

    def __init__(self, most_characters: Annotated[int, Ge(2), Le(128)] = 32):
        self.most_characters = most_characters

    def show(self, trainer: L.Trainer, model: nn.Module, board: TensorBoard) -> None:
        drawn = draw_attention(model, trainer.datamodule, self.most_characters)  # type: ignore[attr-defined]
        if drawn:
            board.log_picture(TAG, png(drawn), *drawn.size, trainer.global_step)


def attention(model: Any, idx: Tensor) -> Tensor | None:
    """The attention of a GPT on idx (1, T): (n_layer, n_head, T, T), rows look at columns; None for other models."""
    if not isinstance(model, GPT):
        return None
    inputs: list[Tensor] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))  # type: ignore[union-attr]
        for block in model.blocks
    ]
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    found, (nh, hs), T = [], model.heads, idx.shape[1]
    for block, x in zip(model.blocks, inputs, strict=True):
        q, k, _ = cast(Block, block).attention.qkv(x).view(T, 3, nh, hs).permute(1, 2, 0, 3)  # (nh, T, hs) each
        scores = q @ k.mT / math.sqrt(hs)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        found.append(scores.masked_fill(future, -math.inf).softmax(-1))
    return torch.stack(found).float().cpu()


def draw_attention(model: nn.Module, data: CharDataModule, most: int) -> Image.Image | None:
    """Draw the attention of a GPT on the first tokens of val, a row for each layer; None for other models."""
    if not isinstance(model, GPT):
        return None
    idx = data.splits["val"][: min(data.block_size, most)].long()
    maps = attention(model, idx[None].to(device_of(model)))
    if maps is None:
        return None
    labels = [data.tokenizer.decode(idx[t : t + 1])[:1] or "?" for t in range(len(idx))]
    rows = []
    for layer, heads in enumerate(maps, 1):
        rows.append(draw_frame(labels, [f"layer {layer}, head {h}" for h in range(1, len(heads) + 1)], CAPTION))
        for h, table in enumerate(heads):
            paste(rows[-1], table, h)
    whole = Image.new("L", (rows[0].width, sum(row.height for row in rows)), PAPER)
    for i, row in enumerate(rows):
        whole.paste(row, (0, i * row.height))
    return whole

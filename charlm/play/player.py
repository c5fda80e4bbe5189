"""A checkpoint as the page shows it: the model, and what is known of its training text."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from charlm import checkpoint
from charlm.data.pairs import Pairs
from charlm.errors import InputError
from charlm.generate import text_of
from charlm.play.copies import Spans
from charlm.study.inspection import MOST, points
from charlm.study.systems import data_of


@dataclass(frozen=True)
class Text:
    """What is known of a training text."""

    pairs: Pairs
    spans: Spans


@dataclass(frozen=True)
class Player:
    """A loaded checkpoint.

    Args:
        name: as it was typed.
        labels: how each token is shown, (V,).
        text: None where the training text is not at hand.
        missing: why it is not.
    """

    name: str
    loaded: checkpoint.Checkpoint
    labels: list[str]
    text: Text | None
    missing: str | None

    def following(self, idx: int) -> Tensor | None:
        """Return the probabilities (V,) of the next token after `idx`, as counted in train.

        Returns None if the text is not at hand, or nothing follows that token in it.
        """
        if self.text is None:
            return None
        V, codes = len(self.labels), self.text.pairs.codes
        low, high = torch.searchsorted(codes, torch.tensor([idx * V, (idx + 1) * V])).tolist()
        counts = self.text.pairs.counts[low:high].float()
        return torch.zeros(V).index_copy_(0, codes[low:high] - idx * V, counts / counts.sum()) if len(counts) else None

    def card(self) -> dict[str, str | int | None]:
        """Describe it for the page."""
        model = self.loaded.model
        return {
            "name": self.name,
            "kind": type(model).__name__,
            "step": self.loaded.step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "corpus": str(self.loaded.corpus["name"]),
            "missing": self.missing,
        }


def load(run: Path, device: str, trust: Collection[str] = ()) -> Player:
    """Load a checkpoint, and its training text where that is at hand.

    Raises:
        InputError: if the checkpoint cannot be used.
    """
    loaded = checkpoint.load(run, device, trust)
    labels = [label(token) for token in loaded.tokenizer.tokens]
    try:
        data = data_of(loaded, run)
    except InputError as error:  # the model still writes
        return Player(str(run), loaded, labels, None, str(error))
    train = data.splits["train"]
    text = Text(data.pairs("train"), Spans(points(data.tokenizer.decode(train[:MOST]))))
    return Player(str(run), loaded, labels, text, None)


def label(token: bytes) -> str:
    """Return the text of a token, or its bytes in hexadecimal if it is a part of a character."""
    text = text_of(token)
    return f"0x{token.hex()}" if text is None else text

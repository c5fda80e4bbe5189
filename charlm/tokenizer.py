"""Text <-> ids. A tokenizer is built from a corpus once and travels with every checkpoint."""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from charlm.errors import InputError


def code_points(text: str) -> np.ndarray:
    """The Unicode code points of `text`, (N,) uint32. Lone surrogates pass, as they do in a Python str."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One id per character: its place in the sorted set of characters of the corpus.

    Args:
        chars: the vocabulary; sorted and made unique here, so that id `i` is `chars[i]`.

    Raises:
        InputError: if there is no character at all.
    """

    name = "char"

    def __init__(self, chars: str):
        self._points = np.unique(code_points(chars))
        if not len(self._points):
            raise InputError("a tokenizer needs at least one character, and this text has none")
        self.chars = self._points.tobytes().decode("utf-32-le", "surrogatepass")
        # One entry per code point up to the largest: a lookup is then a single gather (4.5 MB at the most).
        self._ids = np.full(int(self._points[-1]) + 1, -1, dtype=np.int64)
        self._ids[self._points] = np.arange(len(self._points))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The tokenizer of a corpus: its sorted set of characters."""
        return cls(text)

    @property
    def vocab_size(self) -> int:
        return len(self._points)

    def encode(self, text: str) -> Tensor:
        """Text of N characters -> ids, (N,) int64.

        Raises:
            InputError: for a character outside the vocabulary, saying which and where.
        """
        points = code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        ids = np.where(points < len(self._ids), ids, -1)
        if len(ids) and ids.min() < 0:
            where = int(np.argmax(ids < 0))
            raise InputError(
                f"the character {text[where]!r} (U+{int(points[where]):04X}) at position {where} is not among the "
                f"{self.vocab_size} characters that this model knows: {self._sketch()}"
            )
        return torch.from_numpy(ids)

    def decode(self, ids: Tensor) -> str:
        """Ids (N,), any integer type, on any device -> text of N characters."""
        points = self._points[ids.detach().cpu().numpy().astype(np.int64)]
        return points.tobytes().decode("utf-32-le", "surrogatepass")

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads without running code."""
        return {"name": self.name, "points": self._points.tolist()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        points = np.asarray(state["points"], dtype="<u4")
        return cls(points.tobytes().decode("utf-32-le", "surrogatepass"))

    def _sketch(self, most: int = 100) -> str:
        shown = repr(self.chars[:most])[1:-1]
        return shown if self.vocab_size <= most else f"{shown} ..."


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (CharTokenizer,)}

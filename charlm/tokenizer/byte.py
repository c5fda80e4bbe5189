"""One id per byte of UTF-8: 256 symbols for any text of any language."""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from charlm.data.encoding import utf8


class ByteTokenizer:
    """Id `i` is byte `i`. Nothing is outside the vocabulary, and nothing has to be known of the corpus."""

    name: ClassVar[str] = "byte"
    by_character: ClassVar[bool] = False
    context_free: ClassVar[bool] = True
    vocab_size = 256
    dtype = np.dtype(np.uint8)

    @classmethod
    def from_corpus(cls, corpus: object, train: int) -> Self:
        """The tokenizer of any corpus."""
        return cls()

    @property
    def tokens(self) -> list[bytes]:
        """The UTF-8 of each id, (V,)."""
        return [bytes([i]) for i in range(256)]

    def encode(self, text: str) -> Tensor:
        """Text -> ids, (N,) uint8: its UTF-8.

        Raises:
            InputError: if it has a lone surrogate, which UTF-8 cannot hold.
        """
        return torch.from_numpy(self.encode_utf8(utf8(text)).copy())

    def encode_utf8(self, raw: bytes) -> np.ndarray:
        """UTF-8 -> ids, (N,) uint8, without a copy."""
        return np.frombuffer(raw, np.uint8)

    def decode(self, ids: Tensor) -> str:
        """Ids (N,), any integer type, on any device -> text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: if an id is outside the vocabulary.
        """
        array = ids.detach().cpu().numpy()
        if len(array) and not (array.min() >= 0 and array.max() < 256):
            raise IndexError(f"ids go from 0 to 255, not from {array.min()} to {array.max()}")
        return array.astype(np.uint8, copy=False).tobytes().decode(errors="replace")

    def state_dict(self) -> dict[str, Any]:
        """Plain types only: its name is all."""
        return {"name": self.name}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        return cls()

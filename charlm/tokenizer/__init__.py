"""Text <-> ids: one file each. A tokenizer is made from a corpus once and travels with every checkpoint."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from torch import Tensor

from charlm.data.corpus import Corpus
from charlm.tokenizer.bpe import BPETokenizer
from charlm.tokenizer.byte import ByteTokenizer
from charlm.tokenizer.char import CharTokenizer
from charlm.tokenizer.sentencepiece import SentencePieceTokenizer
from charlm.tokenizer.tiktoken import TiktokenTokenizer


class Tokenizer(Protocol):
    """The methods of every tokenizer."""

    name: ClassVar[str]
    vocab_size: int  # V
    dtype: np.dtype  # the smallest integer type that holds the vocabulary
    by_character: ClassVar[bool]  # whether each id is one character
    context_free: ClassVar[bool]  # whether a text may be encoded in parts, cut between any two characters

    @property
    def tokens(self) -> list[bytes]:
        """The UTF-8 that each id stands for, (V,); perhaps a part of a character."""

    def encode(self, text: str) -> Tensor:
        """Text -> ids, (N,), of `dtype`.

        Raises:
            InputError: if a character is outside the vocabulary.
        """

    def encode_utf8(self, raw: bytes) -> np.ndarray:
        """Valid UTF-8 -> ids, (N,), as `encode`."""

    def decode(self, ids: Tensor) -> str:
        """Ids (N,), any integer type, on any device -> text.

        Raises:
            IndexError: if an id is outside the vocabulary.
        """

    @classmethod
    def from_corpus(cls, corpus: Corpus, train: int) -> Self:
        """Make the tokenizer of a corpus.

        Args:
            train: number of characters at its beginning that are the train split.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads without running code."""

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self: ...


MakeTokenizer = Callable[[Corpus, int], Tokenizer]
CLASSES: tuple[type[Tokenizer], ...] = (
    CharTokenizer,
    ByteTokenizer,
    BPETokenizer,
    TiktokenTokenizer,
    SentencePieceTokenizer,
)
TOKENIZERS = {one.name: one for one in CLASSES}

__all__ = [
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "MakeTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
]

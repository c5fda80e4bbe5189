"""Byte-pair encoding (Sennrich et al. 2016) of bytes (Radford et al. 2019): trained by rustbpe, applied by tiktoken."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from charlm.data.corpus import Corpus
from charlm.data.encoding import utf8
from charlm.data.segments import segments
from charlm.errors import InputError

# How a text falls into words, within which bytes are joined. Each alternative has an end: merging takes time that grows
# with the square of a word's length. The others are those of GPT-2 and GPT-4, by their names in tiktoken.
PATTERNS = {
    "charlm": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}(?!\S)|\s"),
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
        r"\s+(?!\S)|\s"
    ),
}
LONG = re.compile(r"\S{1000}|\s{1000}")  # what is cut, for patterns without an end
TRAINED_ON = 2**26  # characters from the beginning of the train split that a tokenizer is trained on at most


class BytePairs:
    """Ids are sequences of bytes, and among them every single byte.

    Args:
        tokens: the bytes of each id, (V,); among them all single bytes. Of two neighbours, those are joined first whose
            union has the lower id.
        pattern: how a text falls into words: a name in `PATTERNS`.

    Raises:
        InputError: if a single byte is missing or a token repeated.
    """

    name: ClassVar[str]
    by_character: ClassVar[bool] = False
    context_free: ClassVar[bool] = False

    def __init__(self, tokens: list[bytes], pattern: str = "charlm"):
        import tiktoken  # which only this tokenizer needs

        ranks = {token: i for i, token in enumerate(tokens)}
        if len(ranks) < len(tokens) or not ranks.keys() >= {bytes([i]) for i in range(256)}:
            raise InputError("a tokenizer of byte pairs needs every single byte, and no token twice")
        self.tokens, self.pattern, self.vocab_size = tokens, pattern, len(tokens)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> Tensor:
        """Text -> ids, (N,).

        Raises:
            InputError: if it has a lone surrogate, which UTF-8 cannot hold.
        """
        return torch.from_numpy(self.encode_utf8(utf8(text)))

    def encode_utf8(self, raw: bytes) -> np.ndarray:
        """UTF-8 -> ids, (N,)."""
        with panics():
            parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in without_long(raw.decode())]
        return np.concatenate([np.empty(0, self.dtype), *parts]).astype(self.dtype)

    def decode(self, ids: Tensor) -> str:
        """Ids (N,), any integer type, on any device -> text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: if an id is outside the vocabulary.
        """
        return text_of(self.tokens, ids)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only: the tokens in base64."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return {"name": self.name, "pattern": self.pattern, "tokens": tokens}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        return cls([base64.b64decode(token, validate=True) for token in state["tokens"]], state["pattern"])


class BPETokenizer(BytePairs):
    """Ids are single bytes, and sequences of bytes that are frequent in the train split of the corpus."""

    name: ClassVar[str] = "bpe"

    @classmethod
    def from_corpus(cls, corpus: Corpus, train: int, vocab_size: Annotated[int, Ge(257), Le(2**20)] = 512) -> Self:
        """Train a tokenizer.

        Args:
            train: number of characters at the beginning of the corpus to learn from.
            vocab_size: V. A short text may give fewer.
        """
        return cls(trained(corpus, train, vocab_size))


@cache  # a command checks a run before it starts one
def trained(corpus: Corpus, train: int, vocab_size: int) -> list[bytes]:
    """Return the tokens that are learned from the beginning of a corpus, in the order of their ids."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    with panics():
        trainer.train_from_iterator(beginning(corpus, train, TRAINED_ON), vocab_size, pattern=PATTERNS["charlm"])
    ranks: Mapping[bytes, int] = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return sorted(ranks, key=ranks.__getitem__)


def text_of(tokens: Sequence[bytes], ids: Tensor) -> str:
    """Return the text of ids (N,), any integer type, on any device; bytes that are not UTF-8 become U+FFFD.

    Args:
        tokens: the bytes of each id, (V,).

    Raises:
        IndexError: if an id is outside the vocabulary.
    """
    listed = ids.tolist()
    if listed and not (min(listed) >= 0 and max(listed) < len(tokens)):
        raise IndexError(f"ids go from 0 to {len(tokens) - 1}, not from {min(listed)} to {max(listed)}")
    return b"".join(tokens[i] for i in listed).decode(errors="replace")


@contextmanager
def panics() -> Iterator[None]:
    """Raise an error for a panic of a library in Rust, which no `except Exception` catches (tiktoken issue 15)."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"the tokenizer failed: {error}") from error
        raise


def beginning(corpus: Corpus, characters: int, most: int) -> Iterator[str]:
    """Yield the first characters of a corpus in parts: about `most` characters at most."""
    left = most
    for text, _, is_cut in segments(corpus.read(), [characters]):
        yield text
        left -= len(text)
        if is_cut or left <= 0:
            return


def without_long(text: str) -> Iterator[str]:
    """Yield a text in parts that end within long sequences of spaces, or of anything else."""
    start = 0
    for found in LONG.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]

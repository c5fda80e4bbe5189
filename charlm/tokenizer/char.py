"""One id per character of the corpus, as in the lecture."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from charlm.data.corpus import Corpus
from charlm.errors import InputError


def code_points(text: str) -> np.ndarray:
    """The Unicode code points of `text`, (N,) uint32. Lone surrogates pass, as they do in a Python str."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def characters(points: np.ndarray) -> str:
    """Code points (N,) -> text of N characters."""
    return points.tobytes().decode("latin-1" if points.itemsize == 1 else "utf-32-le", "surrogatepass")


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type for ids, with one spare value for unknown characters."""
    return np.dtype(np.uint8 if vocab_size < 256 else np.int16 if vocab_size < 2**15 else np.int32)


class CharTokenizer:
    """One id per character: its place in the sorted set of characters of the corpus.

    Args:
        chars: the vocabulary; sorted and made unique here, so that id `i` is `chars[i]`.

    Raises:
        InputError: if there is no character at all.
    """

    name: ClassVar[str] = "char"
    by_character: ClassVar[bool] = True
    context_free: ClassVar[bool] = True

    def __init__(self, chars: str):
        points = np.flatnonzero(np.bincount(code_points(chars))).astype("<u4")  # without sorting the text
        if not len(points):
            raise InputError("a tokenizer needs at least one character, and this text has none")
        self.chars = characters(points)
        self.vocab_size = len(points)
        # One entry per code point and a last one for all larger ones, so that a lookup is a single gather. Both tables
        # are narrow, because moving memory takes the time.
        self.dtype = dtype = smallest_dtype(self.vocab_size)
        self._unknown = np.iinfo(dtype).max
        self._ids = np.full(int(points[-1]) + 2, self._unknown, dtype=dtype)
        self._ids[points] = np.arange(self.vocab_size)
        self._points = points.astype(np.uint8) if points[-1] < 256 else points
        # Where one byte holds a character and an id, Python's own lookup by byte is the fastest.
        self._of_bytes = bool(points[-1] < 256 and dtype == np.uint8)
        self._id_bytes = self._ids[:256].tobytes().ljust(256, bytes([self._unknown & 0xFF]))
        self._point_bytes = self._points.tobytes().ljust(256)[:256]

    @classmethod
    def from_corpus(cls, corpus: Corpus, train: int) -> Self:
        """The tokenizer of a corpus: its sorted set of characters."""
        return cls(corpus.survey.alphabet)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The tokenizer of a text: its sorted set of characters."""
        return cls(text)

    @property
    def tokens(self) -> list[bytes]:
        """The UTF-8 of each id, (V,)."""
        return [character.encode("utf-8", "surrogatepass") for character in self.chars]

    def encode(self, text: str) -> Tensor:
        """Text of N characters -> ids, (N,), of the smallest integer type that holds the vocabulary.

        Raises:
            InputError: if a character is outside the vocabulary; names it and its place.
        """
        return torch.from_numpy(self._known(self._lookup(text), lambda where: text[where]))

    def encode_utf8(self, raw: bytes) -> np.ndarray:
        """UTF-8 of N characters -> ids, (N,), as `encode`."""
        if self._of_bytes and raw.isascii():
            ids = np.frombuffer(raw.translate(self._id_bytes), dtype=np.uint8)
            return self._known(ids, lambda where: chr(raw[where]))
        text = raw.decode()
        return self._known(self._lookup(text), lambda where: text[where])

    def _known(self, ids: np.ndarray, character: Callable[[int], str]) -> np.ndarray:
        """Return ids after a check that each character is in the vocabulary; `character` returns the one at a place."""
        if len(ids) and ids.max() == self._unknown:
            where = int(np.argmax(ids == self._unknown))
            unknown = character(where)
            raise InputError(
                f"the character {unknown!r} (U+{ord(unknown):04X}) at position {where} is not among the "
                f"{self.vocab_size} characters that this model knows: {self._sketch()}"
            )
        return ids

    def decode(self, ids: Tensor) -> str:
        """Ids (N,), any integer type, on any device -> text of N characters.

        Raises:
            IndexError: if an id is outside the vocabulary.
        """
        array = ids.detach().cpu().numpy()
        if len(array) and not (array.min() >= 0 and array.max() < self.vocab_size):
            raise IndexError(f"ids go from 0 to {self.vocab_size - 1}, not from {array.min()} to {array.max()}")
        if self._of_bytes:
            return array.astype(np.uint8, copy=False).tobytes().translate(self._point_bytes).decode("latin-1")
        return characters(self._points.take(array, mode="clip"))

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads without running code."""
        return {"name": self.name, "points": self._points.tolist()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        return cls(characters(np.asarray(state["points"], dtype="<u4")))

    def _lookup(self, text: str) -> np.ndarray:
        """Ids, with `_unknown` for characters outside the vocabulary."""
        if self._of_bytes:
            with suppress(UnicodeEncodeError):
                return np.frombuffer(bytearray(text, "latin-1").translate(self._id_bytes), dtype=np.uint8)
        return self._ids.take(code_points(text), mode="clip")

    def _sketch(self, most: int = 100) -> str:
        shown = repr(self.chars[:most])[1:-1]
        return shown if self.vocab_size <= most else f"{shown} ..."


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (CharTokenizer,)}

"""SentencePiece (Kudo and Richardson 2018) with lossless settings: pieces of text, and single bytes for the rest."""

import base64
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from charlm.data.corpus import Corpus
from charlm.data.encoding import utf8
from charlm.errors import InputError, printable
from charlm.tokenizer.bpe import beginning, text_of

SPACE = "\u2581"  # how SentencePiece writes a space; where a text has this character itself, it is encoded as bytes
TRAINED_ON = 2**24  # characters of the train split that are learned from at most, since memory grows with them
LINE = 1000  # characters of the longest line to learn from; the trainer leaves out those above 4,192 bytes
SETTINGS: dict[str, Any] = {  # nothing of the text is changed (SentencePiece issues 650 and 804)
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "character_coverage": 1.0,
    "user_defined_symbols": ["\n"],
    "bos_id": -1,
    "eos_id": -1,
    "hard_vocab_limit": False,  # a short text gives fewer pieces
    "num_threads": 1,  # the same pieces each time
    "minloglevel": 2,
}
PROBE = "  a b\n\n\tc  \r\n \u00e9e\u0301\uff21\ufb01 "  # what models that are not lossless change


class SentencePieceTokenizer:
    """Ids are the pieces of a model of SentencePiece.

    Args:
        model: the serialized model.

    Raises:
        InputError: if it is no model, or one that changes the text that it encodes.
    """

    name: ClassVar[str] = "sentencepiece"
    by_character: ClassVar[bool] = False
    context_free: ClassVar[bool] = False

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor  # which only this tokenizer needs

        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise InputError("this is no model of SentencePiece") from error
        self._model, self.vocab_size = model, self._processor.vocab_size()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)
        self.tokens = [*self._tokens()]
        of_byte = {self.tokens[i][0]: i for i in range(self.vocab_size) if self._processor.is_byte(i)}
        if len(of_byte) < 256:
            raise InputError("this model of SentencePiece has no byte_fallback, and cannot hold every text")
        self._space = np.array([of_byte[byte] for byte in SPACE.encode()], self.dtype)
        self._sizes = np.array([len(token) for token in self.tokens])
        if self.decode(torch.from_numpy(self._ids(PROBE))) != PROBE:
            raise InputError(
                "this model of SentencePiece changes the text, and losses per byte would be wrong: train one with "
                "--normalization_rule_name=identity --add_dummy_prefix=false --remove_extra_whitespaces=false"
            )

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        train: int,
        vocab_size: Annotated[int, Ge(258), Le(2**20)] = 512,
        kind: Literal["unigram", "bpe"] = "unigram",
        model: str | None = None,
    ) -> Self:
        """Train a tokenizer, or read one.

        Args:
            train: number of characters at the beginning of the corpus to learn from.
            vocab_size: V. A short text may give fewer.
            kind: unigram (Kudo 2018), or bpe.
            model: a model file to use, as it is; null: learn one.

        Raises:
            InputError: if the file cannot be used, or vocab_size is too small for the characters of the text.
        """
        if model is None:
            return cls(trained(corpus, train, vocab_size, kind))
        try:
            return cls(Path(model).expanduser().read_bytes())
        except OSError as error:
            raise InputError(f"tokenizer.model={model} cannot be read: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"tokenizer.model={model} is not used: {error}") from error

    def encode(self, text: str) -> Tensor:
        """Text -> ids, (N,).

        Raises:
            InputError: if it has a lone surrogate, which UTF-8 cannot hold.
        """
        return torch.from_numpy(self.encode_utf8(utf8(text)))

    def encode_utf8(self, raw: bytes) -> np.ndarray:
        """UTF-8 -> ids, (N,).

        Raises:
            InputError: if the model changes this text.
        """
        ids = self._ids(raw.decode())
        if self._sizes[ids].sum() != len(raw):
            raise InputError("this model of SentencePiece changes the text, and losses per byte would be wrong")
        return ids

    def _ids(self, text: str) -> np.ndarray:
        parts = [np.array(self._processor.encode(part), self.dtype) for part in text.split(SPACE)]
        between = [part for number, part in enumerate(parts) for part in ((self._space, part) if number else (part,))]
        return np.concatenate(between)

    def _tokens(self) -> Iterator[bytes]:
        """Yield the UTF-8 of each id."""
        for i in range(self.vocab_size):
            piece = self._processor.id_to_piece(i)
            if self._processor.is_byte(i):
                yield bytes([int(piece[3:5], 16)])
            elif self._processor.is_unknown(i):  # no text has it, thanks to the single bytes
                yield "\ufffd".encode()
            else:
                yield b"" if self._processor.is_control(i) else piece.replace(SPACE, " ").encode()

    def decode(self, ids: Tensor) -> str:
        """Ids (N,), any integer type, on any device -> text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: if an id is outside the vocabulary.
        """
        return text_of(self.tokens, ids)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only: the model in base64."""
        return {"name": self.name, "model": base64.b64encode(self._model).decode()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        return cls(base64.b64decode(state["model"], validate=True))


@cache  # a command checks a run before it starts one
def trained(corpus: Corpus, train: int, vocab_size: int, kind: str) -> bytes:
    """Return a model that is trained on the beginning of a corpus.

    Raises:
        InputError: if vocab_size is too small for its characters.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(corpus, train),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            **SETTINGS,
        )
    except RuntimeError as error:
        small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if small:
            raise InputError(
                f"tokenizer.vocab_size={vocab_size} is too small for the characters of {corpus.name}: give at least "
                f"{small[1]}, or take tokenizer=bpe"
            ) from error
        raise InputError(
            f"SentencePiece cannot learn from {corpus.name} ({printable(str(error).splitlines()[-1], 200)}): give a "
            f"longer text, or take tokenizer=bpe"
        ) from error
    return model.getvalue()


def lines(corpus: Corpus, train: int) -> Iterator[str]:
    """Yield the lines of the beginning of a corpus, long ones in parts."""
    for text in beginning(corpus, train, TRAINED_ON):
        for line in text.splitlines():
            yield from (line[start : start + LINE] for start in range(0, len(line), LINE))

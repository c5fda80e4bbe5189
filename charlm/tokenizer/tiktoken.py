"""The ready-made tokenizers of GPT-2 and GPT-4, or a file of ranks in the same format (github.com/openai/tiktoken)."""

import base64
import binascii
from pathlib import Path
from typing import ClassVar, Literal, Self

from charlm.data.corpus import Corpus
from charlm.data.download import fetch
from charlm.errors import CorpusUnavailable, InputError
from charlm.home import cache
from charlm.tokenizer.bpe import BytePairs

URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
SHA256 = {
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}
NAMES = {"gpt2": "r50k_base", "gpt4": "cl100k_base"}


class TiktokenTokenizer(BytePairs):
    """Ids of a ready-made vocabulary, without its special tokens."""

    name: ClassVar[str] = "tiktoken"

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        train: int,
        name: Literal["gpt2", "gpt4"] = "gpt2",
        ranks: str | None = None,
        pattern: Literal["charlm", "r50k_base", "cl100k_base"] | None = None,
    ) -> Self:
        """The same tokenizer for every corpus.

        Args:
            name: gpt2 (50,256 tokens) or gpt4 (100,256).
            ranks: a file of ranks in its place: a token in base64 and its id on each line.
            pattern: how a text falls into words; null: that of the name.

        Raises:
            InputError: if the file is missing or of another format, or cannot be downloaded.
        """
        file = Path(ranks).expanduser() if ranks else ready_made(NAMES[name])
        return cls(read_ranks(file), pattern or NAMES[name])


def ready_made(name: str) -> Path:
    """Return the file of ranks of a ready-made tokenizer, which is downloaded once.

    Raises:
        InputError: if it cannot be downloaded.
    """
    place = Path("tokenizers", f"{name}.tiktoken")
    try:
        return fetch(URL.format(name), SHA256[name], place)
    except CorpusUnavailable as error:
        raise InputError(
            f"the tokenizer {name} could not be had ({error}): connect to the internet, or put the file at "
            f"{cache() / place}"
        ) from error


def read_ranks(file: Path) -> list[bytes]:
    """Return the tokens of a file of ranks, in the order of their ids.

    Raises:
        InputError: if it cannot be read, or its ids are not 0, 1, 2, ...
    """
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in pairs}
    except OSError as error:
        raise InputError(f"tokenizer.ranks={file} cannot be read ({error.strerror}): give a file of ranks") from error
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{file} is no file of ranks: each line must be a token in base64 and its id") from error
    if [*ranks] != [*range(len(pairs))]:
        raise InputError(f"{file} is no file of ranks: its ids must be 0, 1, 2, ... in order")
    return [*ranks.values()]

"""General compressors as baselines: what a text costs without any language model."""

import bz2
import lzma
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from charlm.data.corpora import PUBLISHED, corpus_of
from charlm.data.datamodule import CharDataModule
from charlm.tokenizer import ByteTokenizer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 2**20  # bytes that are given to a compressor at a time
FAST, SMALL = "bz2", 2 * 10**6  # takes 0.2 s per MB
WINDOW: dict[int, int] = {  # zstd at its best that does not need more than 128 MB, and finds repetitions as far back
    zstd.CompressionParameter.compression_level: 19,
    zstd.CompressionParameter.window_log: 27,
    zstd.CompressionParameter.enable_long_distance_matching: 1,
}
COMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.compressobj(9, wbits=31),
    "bz2": lambda: bz2.BZ2Compressor(9),
    "xz": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    "zstd": lambda: zstd.ZstdCompressor(options=WINDOW),
}


class Compressed(NamedTuple):
    """The val split, compressed, in bits per byte."""

    compressor: str
    cold_start: float  # alone
    given_train: float  # what train and val take together, less what train takes


def compressed(data: CharDataModule) -> Iterator[Compressed]:
    """Yield what each compressor makes of the val split of a text, whose tokenizer must be that of bytes."""
    data.setup()
    train, val = data.splits["train"], data.splits["val"]
    total = 2 * len(COMPRESSORS) * (len(train) + len(val))
    with tqdm(total=total, desc="compressing", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name in COMPRESSORS:
            cold, alone, both = (size(name, at_work(parts, bar)) for parts in ([val], [train], [train, val]))
            yield Compressed(name, 8 * cold / len(val), 8 * (both - alone) / len(val))


def of_small_text(data: Mapping[str, Any]) -> dict[str, float]:
    """Return what a fast compressor makes of the val split of a small text, in nats per character.

    Args:
        data: settings of a run, resolved.
    """
    settings = {name: value for name, value in data.items() if not name.startswith("_")}
    corpus = corpus_of(settings)
    if corpus.name in PUBLISHED or corpus.survey.bytes > SMALL:
        return {}
    text = CharDataModule(**settings, tokenizer=ByteTokenizer.from_corpus)
    per_char = math.log(2) * bytes_per_character(text)
    train, val = text.splits["train"], text.splits["val"]
    with tqdm(disable=True) as bar:
        alone, both = (size(FAST, at_work(parts, bar)) for parts in ([train], [train, val]))
    return {f"{FAST}, given train": 8 * (both - alone) / len(val) * per_char}


def bytes_per_character(text: CharDataModule) -> float:
    """Return the mean length of the characters of val in a text, whose tokenizer must be that of bytes."""
    text.setup()
    val = text.splits["val"]
    return len(val) / int((val & 0xC0 != 0x80).sum())


def size(name: str, blocks: Iterable[memoryview]) -> int:
    """Return how many bytes a compressor makes of a text."""
    compressor = COMPRESSORS[name]()
    return sum(len(compressor.compress(block)) for block in blocks) + len(compressor.flush())


def at_work(parts: Iterable[Tensor], bar: Any) -> Iterator[memoryview]:
    """Yield the bytes of parts of a text in blocks, and show how far it is."""
    for part in parts:
        for start in range(0, len(part), BLOCK):
            yield part[start : start + BLOCK].numpy().data
            bar.update(min(BLOCK, len(part) - start))

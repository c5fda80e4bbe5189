"""Files in, pieces of UTF-8 out: each file is read once, from start to end, in constant memory."""

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from charlm.data.encoding import check
from charlm.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 2**18  # bytes that are read at a time: they stay in the cache of the CPU
MARK = b"\xef\xbb\xbf"  # a byte order mark, which is no text at the start of a file
PACKED = (".gz", ".zst")


class Piece(NamedTuple):
    """A part of a text: valid UTF-8, never empty, cut between characters."""

    raw: bytes
    begins: bool  # a document


def plain_name(file: Path) -> str:
    """Return the name of a file without the suffix of its compression."""
    return file.stem if file.suffix in PACKED else file.name


def read(file: Path, field: str, cut: bool = False) -> Iterator[Piece]:
    """Yield the text of a file: UTF-8, with or without a byte order mark, perhaps packed (.gz, .zst).

    Args:
        field: the field of each line of a .jsonl file that holds a document.
        cut: whether the file may end within a character, which is then left out.

    Raises:
        InputError: if it cannot be read or unpacked, is not UTF-8, or has a line that is no such document.
    """
    try:
        with unpacked(file) as stream:
            if plain_name(file).endswith(".jsonl"):
                yield from documents(file, stream, field)
            else:
                yield from blocks(file, stream, cut)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstd.ZstdError) as error:
        raise InputError(f"{file} cannot be unpacked ({error}): unpack it by hand, or give another file") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise InputError(str(error)) from error


@contextmanager
def unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked if its name ends in .gz or .zst."""
    with file.open("rb") as packed:
        opener: Any = {".gz": gzip.open, ".zst": zstd.open}.get(file.suffix, lambda same: same)
        with opener(packed) as stream:
            yield stream


def blocks(file: Path, stream: IO[bytes], cut: bool = False) -> Iterator[Piece]:
    """Yield a file as one document.

    Raises:
        UnicodeError: if it is not UTF-8; the message names what it seems to be and how to convert it.
    """
    beginning, offset, rest, begins = b"", 0, b"", True
    while block := stream.read(BLOCK):
        beginning = beginning or block
        block = rest + block
        whole = len(block) if block.isascii() else whole_characters(block)
        check(file, block[:whole], offset, beginning)
        rest = block[whole:]
        text = block[:whole].removeprefix(MARK) if offset == 0 else block[:whole]
        if text:
            yield Piece(text, begins)
            begins = False
        offset += whole
    if rest and not cut:  # the file ends within a character
        check(file, rest, offset, beginning)


def whole_characters(block: bytes) -> int:
    """Return how many bytes of UTF-8 to take, so that no character is cut: all but 3 at least."""
    for back in range(1, min(4, len(block)) + 1):
        byte = block[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(block) - back if length > back else len(block)
    return len(block)


def documents(file: Path, stream: IO[bytes], field: str) -> Iterator[Piece]:
    """Yield the documents of a JSON-lines file, each ending in a newline.

    Raises:
        UnicodeError: if a line is not UTF-8.
        InputError: if a line is no JSON object with text in `field`.
    """
    offset = 0
    for number, line in enumerate(stream, 1):
        check(file, line, offset, line)
        offset += len(line)
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)
            text = found[field]
            raw = text.encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            has = f"it has {', '.join(found)}" if isinstance(error, KeyError) else "it must be a JSON object with text"
            raise InputError(
                f"line {number} of {file} has no text in the field {field!r} ({has}): name another with data.field="
            ) from error
        if raw:
            raw += b"" if raw.endswith(b"\n") else b"\n"
            yield from pieces_of(raw)


def pieces_of(raw: bytes) -> Iterator[Piece]:
    """Yield one document of valid UTF-8 in pieces."""
    start = 0
    while start < len(raw):
        block = raw[start : start + BLOCK]
        block = block[: whole_characters(block)]
        yield Piece(block, start == 0)
        start += len(block)


def at_work(pieces: Iterable[Piece], title: str, total: int | None) -> Iterator[Piece]:
    """Show a progress bar while a large text is read, on a terminal."""
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece.raw))

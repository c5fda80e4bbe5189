"""A text in parts that a tokenizer of words can encode one by one, with the ids of the whole."""

import re
from collections.abc import Iterable, Iterator, Sequence

from charlm.data.reader import Piece

# Every pattern of words ends a word between a letter and a space that another letter follows.
SAFE = re.compile(r"[A-Za-z](?= [A-Za-z])")
SHORTEST, LONGEST = 2**14, 2**15  # characters of a segment, unless it is the last of its document


def segments(pieces: Iterable[Piece], cuts: Sequence[int]) -> Iterator[tuple[str, bool, bool]]:
    """Yield parts of a text, whether each begins a document, and whether a cut follows it.

    A segment ends at the first safe place after SHORTEST characters; in text without such a place, after LONGEST. So
    segments, and thus ids, do not depend on how the pieces were cut.
    """
    held, begins = "", False
    for raw, begins_document, is_cut in cut_at(pieces, cuts):
        if begins_document and held:
            yield held, begins, False
            held, begins = "", False
        begins = begins or begins_document
        held += raw.decode()
        start = 0
        while len(held) - start > LONGEST + 2:  # what decides about a place is here
            found = SAFE.search(held, start + SHORTEST, start + LONGEST)
            end = found.end() if found else start + LONGEST
            yield held[start:end], begins, False
            start, begins = end, False
        held = held[start:]
        if is_cut and held:
            yield held, begins, True
            held, begins = "", False
    if held:
        yield held, begins, False


def cut_at(pieces: Iterable[Piece], cuts: Sequence[int]) -> Iterator[tuple[bytes, bool, bool]]:
    """Yield parts of a text, whether each begins a document, and whether a cut follows it.

    Args:
        cuts: numbers of characters, in ascending order.
    """
    position, left = 0, [*cuts]
    for raw, begins in pieces:
        rest, begin = raw, begins
        while left and rest:
            text = None if rest.isascii() else rest.decode()
            length = len(rest if text is None else text)
            if position + length < left[0]:
                break
            take = left.pop(0) - position
            part = rest[:take] if text is None else text[:take].encode()
            if part:
                yield part, begin, True
            rest, begin = rest[len(part) :], begin and not part
            position += take
        if rest:
            yield rest, begin, False
            position += len(rest) if rest.isascii() else len(rest.decode())

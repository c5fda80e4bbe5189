"""A description of a text from one pass over it: length, hash, alphabet, and characters that are rarely intended."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from charlm.data.reader import Piece


@dataclass(frozen=True)
class Survey:
    """A text, described without holding it.

    Args:
        sha256: of its UTF-8.
        alphabet: its characters, sorted.
        documents: how many it consists of: files, or lines of JSON.
        layout: sha256 of their starts.
        cuts: number of characters before each of some numbers of bytes; a character that one falls into comes after.
        nuls, crlfs: how many NUL characters, and line ends of Windows, it has.
    """

    sha256: str
    characters: int
    bytes: int
    alphabet: str
    documents: int
    layout: str
    cuts: list[int]
    nuls: int
    crlfs: int

    def cautions(self, name: str) -> Iterator[str]:
        """Warn of characters that the model learns but that are seldom meant as text, in a line for each kind."""
        if self.nuls:
            yield (
                f"{name} contains {self.nuls:,} NUL characters, which the model learns as text: if the file is not "
                f"meant to have them, remove them with tr -d '\\000' < FILE > NEW"
            )
        if self.crlfs:
            yield (
                f"{name} has {self.crlfs:,} line ends of Windows (\\r\\n), and the model learns \\r as a character: "
                f"remove it with dos2unix FILE, or tr -d '\\r' < FILE > NEW"
            )


def survey(pieces: Iterable[Piece], cuts: Sequence[int] = ()) -> Survey:
    """Read a text once, in constant memory.

    Args:
        cuts: numbers of bytes, in ascending order.
    """
    import numpy as np  # which the process of a sweep does without

    digest, layout = hashlib.sha256(), hashlib.sha256()
    ascii, seen = b"", np.zeros(0x110000, bool)  # characters that were met: ASCII, and all others by code point
    n_characters = n_bytes = documents = nuls = crlfs = 0
    ends_in_cr, left_cuts, found = False, [*cuts], []
    for raw, begins in pieces:
        digest.update(raw)
        if begins:
            documents += 1
            layout.update(b"%d " % n_bytes)
        while left_cuts and left_cuts[0] < n_bytes + len(raw):
            found.append(n_characters + characters(raw[: left_cuts.pop(0) - n_bytes]))
        n_bytes += len(raw)
        # To delete what is known is faster than to count: nearly all pieces have nothing left.
        if left := raw.translate(None, delete=ascii):
            ascii += bytes(byte for byte in {*left} if byte < 128)
        if raw.isascii():
            n_characters += len(raw)
        else:
            text = raw.decode()
            n_characters += len(text)
            seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
        if 0 in ascii:
            nuls += raw.count(0)
        if 13 in ascii:
            crlfs += raw.count(b"\r\n") + (ends_in_cr and raw.startswith(b"\n"))
            ends_in_cr = raw.endswith(b"\r")
    seen[[*ascii]] = True
    alphabet = "".join(map(chr, seen.nonzero()[0]))
    found += [n_characters] * len(left_cuts)
    return Survey(
        digest.hexdigest(), n_characters, n_bytes, alphabet, documents, layout.hexdigest(), found, nuls, crlfs
    )


def characters(raw: bytes) -> int:
    """Return the number of whole characters in UTF-8 that may end within one."""
    return len(raw.decode(errors="ignore"))

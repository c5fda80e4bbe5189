"""UTF-8: what is something else gets a line that says what it seems to be, and how to convert it."""

import codecs
import shlex
from pathlib import Path

from charlm.errors import InputError

SAMPLE = 2**16  # leading bytes of a file that decide its encoding
MARKS = {  # UTF-32 first, as its little-endian mark begins with that of UTF-16
    "UTF-32LE": codecs.BOM_UTF32_LE,
    "UTF-32BE": codecs.BOM_UTF32_BE,
    "UTF-16LE": codecs.BOM_UTF16_LE,
    "UTF-16BE": codecs.BOM_UTF16_BE,
}
CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r"})  # which no text of ASCII, Latin-1 or UTF-8 needs
HIGH = bytes(range(128, 256))


def utf8(text: str) -> bytes:
    """Return a text in UTF-8.

    Raises:
        InputError: if it has a lone surrogate, which UTF-8 cannot hold.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise InputError(f"{half} is half of a character, which UTF-8 cannot hold: remove it") from None


def check(file: Path, raw: bytes, offset: int, beginning: bytes) -> None:
    """Check that a part of a file is UTF-8.

    Args:
        raw: whole characters, if it is.
        offset: bytes of the file before this part.
        beginning: the first bytes of the file, which show other encodings.

    Raises:
        UnicodeError: if it is something else; the message names what it seems to be and how to convert it.
    """
    sample = beginning[:SAMPLE]
    if offset == 0 and b"\0" in sample and (name := wide(sample)):  # such text may be valid UTF-8, full of NULs
        raise UnicodeError(f"{file} is {name} and not UTF-8: convert it with {conversion(file, name)}")
    if raw.isascii():
        return
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        known = sample + raw if offset else raw
        raise UnicodeError(f"{file} is not UTF-8: {where}; {remedy(file, sample, known)}") from error


def remedy(file: Path, sample: bytes, raw: bytes) -> str:
    """Suggest what to do with a file that is not UTF-8.

    Args:
        sample: its first bytes.
        raw: its beginning, and the part that is not UTF-8.
    """
    if name := wide(sample):
        return f"it is {name}, convert it with {conversion(file, name)}"
    if count(sample, CONTROLS) > len(sample) / 100:
        return "it seems to be binary and no text, give a text file"
    lenient = raw.decode("utf-8", "replace")
    broken = lenient.count("\ufffd")
    if sum(character > "\x7f" for character in lenient) > 2 * broken:  # Latin-1 hardly ever looks like UTF-8
        return f"only some of its bytes are damaged, remove them with {conversion(file, 'UTF-8')}"
    # Western text is mostly ASCII; for any other text, Latin-1 would turn its alphabet into garbage.
    if 3 * count(raw, HIGH) < len(raw) - count(raw, b" \n\r\t"):
        # Windows puts quotes and dashes where Latin-1 has control characters.
        name = "WINDOWS-1252" if count(raw, HIGH[:32]) else "LATIN1"
        if decodes(raw, name):
            return f"it may be {name}, convert it with {conversion(file, name)}"
    return f"find its encoding, and convert it with {conversion(file, 'ENCODING')}"


def wide(sample: bytes) -> str | None:
    """Recognise UTF-16 and UTF-32 by a byte order mark or by their zeros, and return the name that iconv has for it."""
    for name, mark in MARKS.items():
        if sample.startswith(mark) and decodes(sample, name):
            return name
    # Of most alphabets, half of the bytes of UTF-16 are below 32, and on the same side of each character.
    if 4 * count(sample, CONTROLS) < len(sample):
        return None
    little_end_first = count(sample[1::2], CONTROLS) > count(sample[::2], CONTROLS)
    for name in ("UTF-16LE", "UTF-32LE") if little_end_first else ("UTF-16BE", "UTF-32BE"):
        if (text := decodes(sample, name)) and {*text}.isdisjoint(CONTROLS.decode()):
            return name
    return None


def decodes(raw: bytes, name: str) -> str | None:
    """Decode bytes whose last character may be cut off; None if they are not of this encoding."""
    try:
        return codecs.getincrementaldecoder(name)().decode(raw)
    except UnicodeDecodeError:
        return None


def count(raw: bytes, among: bytes) -> int:
    """Count the bytes of `raw` that are among these."""
    return len(raw) - len(raw.translate(None, delete=among))


def conversion(file: Path, name: str) -> str:
    """Return the command that converts a file to UTF-8; a file in UTF-8 only loses its invalid bytes."""
    options = f"{'-c ' * (name == 'UTF-8')}-f {name} -t UTF-8"
    if unpack := {".gz": "gunzip", ".zst": "zstd -d"}.get(file.suffix):
        return f"{unpack} -c {shlex.quote(str(file))} | iconv {options} > NEW"
    return f"iconv {options} {shlex.quote(str(file))} > NEW"

"""Standard output and error that never fail, whether closed, full, vanished or of a narrow encoding."""

import codecs
import errno
import io
import os
import select
import sys
from typing import Any

SIGPIPE = (
    13  # a number, since Windows lacks the signal; shells report 128 + 13 for a program that wrote to a closed pipe
)
HANDLER = "charlm"  # the name of `spelled` as an error handler of codecs
ASCII = {"±": "+-", "≈": "~", "…": "...", "×": "x", "·": ".", "−": "-", "–": "-", "—": "-", "‘": "'", "’": "'"}
ASCII |= {"“": '"', "”": '"', "│": "|", "┃": "|", "║": "|"}

reader_left = False  # has the program that reads our standard output ended, as in `| head`?


def prepare() -> None:
    """Make standard output and error safe to write to, at the start of a program.

    A stream that a notebook or a test has put in place of the real one stays as it is, so a second call does nothing.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next file would get this number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error(HANDLER, spelled)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if sys.stdout is sys.__stdout__:
        sys.stdout = guarded(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = guarded(sys.stderr, 2)


def write_to(file: str) -> None:
    """Append standard output and error to a file from now on, and those of processes that this one starts."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(descriptor, number)
        if os.name == "nt":  # a stream for the console, which the file is not
            stream = open(number, "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def guarded(stream: Any, descriptor: int) -> Any:
    """Return a text stream like `stream`, which is None where the descriptor was closed when Python started."""
    if os.name == "nt" and stream:  # a console of Windows takes text, and no bytes
        stream.reconfigure(errors=HANDLER)
        return stream
    if not stream:  # the descriptor may belong to another file by now
        raw = Unfailing(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors=HANDLER)
    raw = Unfailing(descriptor, "w", closefd=False)
    try:
        stream.flush()
    except OSError as error:
        raw.note(error)
    binary: Any = raw if stream.write_through else io.BufferedWriter(raw)  # as `python -u` is without a buffer
    return io.TextIOWrapper(
        binary,
        encoding=stream.encoding,
        errors=HANDLER,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class Unfailing(io.FileIO):
    """A descriptor that drops what it cannot write.

    No layer above it then sees an error, not even Python's own flush at exit.
    """

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that another program made non-blocking is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.note(error)
            return memoryview(data).nbytes

    def note(self, error: OSError) -> None:
        """Remember that the reader of standard output has left. A full disk or a lost terminal does not count."""
        global reader_left
        reader_left |= error.errno == errno.EPIPE and self.fileno() == 1


def spelled(error: UnicodeError) -> tuple[str, int]:
    """Spell characters that an encoding lacks in ASCII, as an error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(ascii_for, error.object[error.start : error.end])), error.end


def ascii_for(character: str) -> str:
    drawn = "\u2500" <= character <= "\u259f"  # lines and blocks of tables and bars
    return ASCII.get(character, "-" if drawn else "?")

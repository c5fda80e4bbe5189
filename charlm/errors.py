"""Errors that a user can fix: one line each, printed at the top of every command."""

import errno
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from charlm.system import memory, posix, streams

SMALLER = "lower data.batch_size, data.block_size or the size of the model, or train on less text"

# Errors of the file system that a user can fix; any other OSError is a defect of charlm.
DISK_TROUBLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EFBIG,
    errno.EIO, errno.ESTALE, errno.ENAMETOOLONG
}  # fmt: skip


# Control characters, line and paragraph separators, overrides of the direction of writing, and lone surrogates: a
# terminal would obey these instead of showing them.
COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_PART = 1000  # characters of a message that are shown at its beginning, and at its end


def printable(text: str, longest: int | None = None, keep: str = "") -> str:
    """Return text that is safe to print, wherever it comes from: no character in it commands a terminal.

    Args:
        longest: how many characters to return at most; longer text ends with an ellipsis.
        keep: characters to leave as they are, such as the newlines of a text of several lines.
    """

    def picture(found: re.Match[str]) -> str:
        code = ord(found[0])
        if found[0] in keep:
            return found[0]
        # Unicode has pictures of control characters.
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    clean = COMMANDS.sub(picture, text)
    return clean if longest is None or len(clean) <= longest else f"{clean[: longest - 1]}…"


def one_line(error: BaseException) -> str:
    """Return a library's message with its lines joined, without those that are only for its developers."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return "; ".join(line for line in lines if line and not line.startswith(("full_key", "object_type", "See https")))


class InputError(ValueError):
    """A mistake of the user, as one line: what was given, what is allowed, what to do."""

    code = 2  # of the exit


class DiskError(InputError):
    """A file could not be written: which one, why, what is still intact, what to do."""

    code = 1


class Diverged(InputError):
    """The loss or a weight became NaN or infinite: at which step, which checkpoint is intact, what to try."""

    code = 1
    words = "training diverged"  # start of its message


class CorpusUnavailable(InputError):
    """A corpus that exists but cannot be downloaded, for example without internet."""


class OutOfMemory(InputError):
    """An allocation failed: how much was requested, what the limit is, what to make smaller."""

    code = 1


class Terminated(SystemExit):
    """SIGTERM or SIGHUP outside of training; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


received: BaseException | None = None  # what the last signal raised


@contextmanager
def one_line_errors(smaller: str = SMALLER) -> Iterator[None]:
    """Context around every program: a mistake ends it with one line on standard error, and a closed pipe is no error.

    Args:
        smaller: what to change if memory does not suffice.

    Raises:
        SystemExit: with code 2 for a mistake; 1 for trouble with the disk or with memory; 128 + the signal's number
            for Ctrl-C, SIGTERM and SIGHUP; 141 if the reader of standard output has left (`| head`).
    """
    streams.prepare()
    try:
        with terminable():
            yield
        end_unread()
    except BaseException as error:
        if ending := ending_for(error, smaller):
            stop(*ending)
        if isinstance(error, SystemExit) and not error.code:
            end_unread()
        raise


def end_unread() -> None:
    """Exit like a program that SIGPIPE ended, if the reader of standard output has left."""
    sys.stdout.flush()
    if streams.reader_left:
        sys.exit(128 + streams.SIGPIPE)


def ending_for(error: BaseException, smaller: str) -> tuple[str, int] | None:
    """Return the line and the exit code for an error; None for a defect, and for an end that needs no line."""
    if isinstance(error, InputError):
        return str(error), error.code
    # Lightning ends a run silently on Ctrl-C, and with exit code 0 on SIGTERM, as if it had finished.
    if interrupted(error) and getattr(error, "code", None) != 130:
        return "interrupted", 130
    if type(error).__name__ == "SIGTERMException":
        error = Terminated(signal.SIGTERM)
    if isinstance(error, Terminated):
        name = "Ctrl-C" if error.signal == signal.SIGINT else error.signal.name
        return f"stopped by {name} before the end", 128 + error.signal
    if isinstance(error, SystemExit):
        return None
    if trouble := out_of_memory(error, smaller):
        return str(trouble), trouble.code
    if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
        return f"{error.filename or 'the disk'}: {error.strerror}; choose another folder, or make room", 1
    return None


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated on SIGTERM and SIGHUP, so that run.json tells how the run ended and no partial file is left.

    Ctrl-C raises KeyboardInterrupt, as always. Signals that the parent ignored, as nohup does, stay ignored, and other
    handlers stay in charge.
    """
    global received
    before: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    before |= dict.fromkeys(posix.signals("SIGTERM", "SIGHUP"), signal.SIG_DFL)
    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in before.items() if in_main_thread and signal.getsignal(number) == handler]

    def end(number: int, frame: FrameType | None) -> None:
        global received
        if number == signal.SIGINT:
            received = KeyboardInterrupt()
            raise received
        error = sys.exception()
        if error and any(isinstance(cause, SystemExit) for cause in chain(error)):
            return  # the process ends already, and run.json has to say by what
        # A closing terminal sends SIGHUP twice, and the second must not interrupt the end that the first began.
        for ignored in {*ours} - {signal.SIGINT}:
            signal.signal(ignored, signal.SIG_IGN)
        received = Terminated(number)
        raise received

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        received = None
        for number in ours:
            signal.signal(number, before[number])


def raise_received() -> None:
    """Raise what a signal raised before, if a library caught it: Hydra does while it composes a configuration."""
    if received:
        raise received


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP while files that belong together are written."""
    numbers = posix.signals("SIGINT", "SIGTERM", "SIGHUP")
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers if in_main_thread}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemory for a failed allocation, where only an InputError reaches the user: from another process."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError) and (trouble := out_of_memory(error)):
            raise trouble from error
        raise


def out_of_memory(error: BaseException, smaller: str = SMALLER) -> OutOfMemory | None:
    """Return the failed allocation behind an error as an OutOfMemory; None if something else is behind it."""
    for cause in chain(error):
        if memory.refused(cause):
            sizes = memory.describe(cause)
            return OutOfMemory(f"out of memory{f' ({sizes})' * bool(sizes)}: {smaller}")
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    before: BaseException | None = error
    seen: list[BaseException] = []
    while before is not None and before not in seen:  # an error may be its own cause
        yield before
        seen.append(before)
        before = before.__cause__ or before.__context__


def interrupted(error: BaseException) -> bool:
    """Return whether an error comes from Ctrl-C; libraries in C++ turn that into errors of their own."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in chain(error))


def stop(line: str, code: int) -> NoReturn:
    warn(line)
    sys.exit(code)


def warn(line: str) -> None:
    """Print a warning on standard error, after what was printed so far."""
    sys.stdout.flush()
    text = printable(line)
    if len(text) > 2 * LONGEST_PART:  # cut the middle, which usually has the long value
        text = f"{text[:LONGEST_PART]}…{text[-LONGEST_PART:]}"
    print(f"charlm: {text}", file=sys.stderr)

"""What a person gave cannot work: raised with one line to read, told where a command begins."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

# Reasons of the file system that a person can do something about; any other OSError is a defect of ours.
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
    """A mistake of the user's, told in one line: what was given, what is allowed, what to do."""

    code = 2  # of the exit


class DiskError(InputError):
    """The disk did not take a file: which one, why, what still stands, what to do."""

    code = 1


class Diverged(InputError):
    """Training has left the numbers: at which step, what still stands, what to try."""

    code = 1
    words = "training diverged"  # with which its line begins


class CorpusUnavailable(InputError):
    """A corpus that exists but cannot be had from here, for example without internet."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Tell a person's mistake in one line on standard error, with exit code 2; 1 for trouble with the disk."""
    try:
        yield
    except InputError as error:
        stop(str(error), error.code)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except SystemExit as ended:
        # Lightning ends a run in silence on Ctrl-C, and with exit code 0 on SIGTERM, which would say that it finished.
        if ended.code != 130 and interrupted(ended):
            stop("interrupted", 130)
        if type(ended).__name__ != "SIGTERMException":
            raise
        stop("terminated before the end", 143)
    except BrokenPipeError:
        # The reader of our output is gone (| head): no more to say. Python's own flush at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        stop(f"{error.filename or 'the disk'}: {error.strerror}; choose another folder, or make room", 1)
    except Exception as error:
        if not interrupted(error):
            raise
        stop("interrupted", 130)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    before: BaseException | None = error
    seen: list[BaseException] = []
    while before is not None and before not in seen:  # what is raised twice may come of itself
        yield before
        seen.append(before)
        before = before.__cause__ or before.__context__


def interrupted(error: BaseException) -> bool:
    """Is this what came of Ctrl-C, under another name? torch's writer has one of its own."""
    return any(isinstance(one, KeyboardInterrupt) for one in chain(error))


def stop(line: str, code: int) -> NoReturn:
    warn(line)
    sys.exit(code)


def warn(line: str) -> None:
    """Tell something that a person should know, behind what was printed so far."""
    sys.stdout.flush()
    text = printable(line)
    if len(text) > 2 * LONGEST_PART:  # of a long value, which mostly is in its middle
        text = f"{text[:LONGEST_PART]}…{text[-LONGEST_PART:]}"
    print(f"charlm: {text}", file=sys.stderr)

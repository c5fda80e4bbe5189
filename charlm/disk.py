"""Files that are whole or not there, whatever ends the process that writes them."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

PARTIAL = ".partial-"  # what files are called until they are whole


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object], previous: Path | None = None) -> None:
    """Write a file so that its name only ever stands for a whole one: beside it, to the disk, then renamed.

    What stood there before goes to `previous`, if that is given, but only once its successor stands.

    Raises:
        OSError: if it cannot be written; what stood there before is then untouched.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    spare = temporary + ".before"
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        keep = previous is not None and path.exists()
        if keep:
            link(path, spare)
        os.replace(temporary, path)
        if previous and keep:
            os.replace(spare, previous)
    except BaseException:
        for left in (temporary, spare):
            Path(left).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def link(file: Path, name: str) -> None:
    """Another name for the same file, or a copy where the file system has no such thing."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
